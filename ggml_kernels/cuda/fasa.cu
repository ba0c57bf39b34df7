#include "fasa-cuda.cuh"

#include "fasa-kernels.cuh"

// a stream of ggml-cuda, with memory from its pool
struct fasa_cuda_launcher {
    ggml_backend_cuda_context & ctx;
    const int32_t n_cores = ggml_cuda_info().devices[ctx.device].nsm;

    ggml_cuda_pool_alloc<char> memory;

    explicit fasa_cuda_launcher(ggml_backend_cuda_context & ctx) : ctx(ctx) {}

    void * alloc(size_t size) { return memory.alloc(ctx.pool(), size); }

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
    return ggml_cuda_info().devices[device].cc >= GGML_CUDA_CC_TURING && fasa_supported(dst);
}
