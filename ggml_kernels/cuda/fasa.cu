#include "fasa-cuda.cuh"

#include "fasa-kernels.cuh"

#include <list>

// a stream of ggml-cuda, with memory from its pool
struct fasa_cuda_launcher {
    ggml_backend_cuda_context & ctx;
    const int32_t n_blocks = 2*ggml_cuda_info().devices[ctx.device].nsm;

    std::list<ggml_cuda_pool_alloc<char>> allocated; // freed in reverse order, as a pool wants it

    explicit fasa_cuda_launcher(ggml_backend_cuda_context & ctx) : ctx(ctx) {}

    ~fasa_cuda_launcher() {
        while (!allocated.empty()) {
            allocated.pop_back();
        }
    }

    void * alloc(size_t size) {
        allocated.emplace_back(ctx.pool(), size);
        return allocated.back().get();
    }

    template <typename... T, typename... U>
    void launch(void (*kernel)(T...), dim3 grid, size_t shared, U... args) {
        ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3(FASA_THREADS), shared, ctx.stream()), (T) args...);
    }
};

void ggml_cuda_fasa_store(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    fasa_cuda_launcher launcher(ctx);
    fasa_launch_store(launcher, dst);
}

void ggml_cuda_fasa_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    fasa_cuda_launcher launcher(ctx);
    fasa_launch_select(launcher, dst);
}

void ggml_cuda_fasa_attend(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    fasa_cuda_launcher launcher(ctx);
    fasa_launch_attend(launcher, dst);
}

bool ggml_cuda_fasa_supported(int device, const ggml_tensor * dst) {
    if (ggml_cuda_info().devices[device].cc < GGML_CUDA_CC_TURING) {
        return false;
    }
    switch (dst->op) {
        case GGML_OP_FASA_STORE:  return fasa_store_supported(dst);
        case GGML_OP_FASA_SELECT: return fasa_select_supported(dst);
        case GGML_OP_FASA_ATTEND: return fasa_attend_supported(dst);
        default:                  return false;
    }
}
