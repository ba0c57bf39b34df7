#include "fasa-cuda.cuh"

#include "fasa-kernels.cuh"

#include "../gpu/fasa-fuse.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

// Blocks of a kernel that a multiprocessor holds at once; 0: blocks cannot wait for one another there. The limit of shared memory is
// of the kernel, whoever launches it: it is raised once.
static int32_t fasa_blocks_per_core(int device, const void * kernel, size_t shared) {
    const auto & info = ggml_cuda_info().devices[device];
    if (!FASA_BLOCKS_MEET || !info.supports_cooperative_launch || shared > info.smpbo) {
        return 0;
    }
    static std::mutex mutex;
    static std::map<std::tuple<int, const void *, size_t>, int> known;

    std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({ device, kernel, shared });
    if (found != known.end()) {
        return found->second;
    }
    int res = 0;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, info.smpbo));
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&res, kernel, FASA_THREADS, shared));
    known[{ device, kernel, shared }] = res;
    return res;
}

// a stream of ggml-cuda, with memory from its pool
struct fasa_cuda_launcher {
    ggml_backend_cuda_context & ctx;
    const ggml_cuda_device_info::cuda_device_info & device = ggml_cuda_info().devices[ctx.device];
    const int32_t n_cores = device.nsm;

    ggml_cuda_pool_alloc<char> memory;

    explicit fasa_cuda_launcher(ggml_backend_cuda_context & ctx) : ctx(ctx) {}

    void * alloc(size_t size) { return memory.alloc(ctx.pool(), size); }

    template <typename... T, typename... U>
    void launch(void (*kernel)(T...), dim3 grid, size_t shared, U... args) {
        ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3(FASA_THREADS), shared, ctx.stream()), (T) args...);
    }

    // of the stream, freed with the context
    uint32_t * counters(size_t size) {
        std::shared_ptr<void> & res = ctx.fasa_counters[ctx.curr_stream_no];
        if (!res) {
            void * p = nullptr;
            CUDA_CHECK(cudaMalloc(&p, size));
            res.reset(p, cudaFree);
            // there before anything is launched, whatever the stream is recording
            CUDA_CHECK(cudaMemsetAsync(p, 0, size, cudaStreamPerThread));
            CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
        }
        return (uint32_t *) res.get();
    }

    template <typename... T>
    int32_t n_resident(void (*kernel)(T...), size_t shared) {
        return n_cores*fasa_blocks_per_core(ctx.device, (const void *) kernel, shared);
    }

    // cooperative: two of them at the same time, on streams of their own, would wait for each other's room for ever
    template <typename... T, typename... U>
    bool launch_together(void (*kernel)(T...), dim3 grid, size_t shared, U... args) {
#if defined(GGML_CUDA_USE_PDL)
        static const bool is_pdl_on = getenv("GGML_CUDA_PDL") == nullptr || atoi(getenv("GGML_CUDA_PDL")) != 0; // as ggml_cuda_kernel_launch

        cudaLaunchAttribute attributes[2] = {};
        attributes[0].id = cudaLaunchAttributeCooperative;
        attributes[0].val.cooperative = 1;
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;

        cudaLaunchConfig_t config = {};
        config.gridDim          = grid;
        config.blockDim         = dim3(FASA_THREADS);
        config.dynamicSmemBytes = shared;
        config.stream           = ctx.stream();
        config.attrs            = attributes;
        config.numAttrs         = is_pdl_on && ggml_cuda_kernel_can_use_pdl((const void *) kernel) ? 2 : 1;

        const cudaError_t error = cudaLaunchKernelEx(&config, kernel, (T) args...);
#else
        std::tuple<T...> values((T) args...);
        void * pointers[sizeof...(T)];
        std::apply([&](auto &... value) { size_t i = 0; ((pointers[i++] = &value), ...); }, values);

        const cudaError_t error = cudaLaunchCooperativeKernel((const void *) kernel, grid, dim3(FASA_THREADS), pointers, shared, ctx.stream());
#endif
        if (error == cudaErrorCooperativeLaunchTooLarge) { // others hold a part of the device
            (void) cudaGetLastError();
            return false;
        }
        CUDA_CHECK(error);
        return true;
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

int ggml_cuda_fasa_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    if (ctx.curr_stream_no != 0) {
        return 0; // K and V may be on streams of their own, of which this one knows nothing
    }
    fasa_cuda_launcher launcher(ctx);
    if (const int store = fasa_fused_store(graph, i); store > i) {
        fasa_launch_store_and_copy(launcher, graph->nodes[store], graph->nodes[i]);
        return store - i;
    }
    if (const int attend = fasa_fused_attend(graph, i); attend > i) {
        if (fasa_launch_decode(launcher, graph->nodes[i], graph->nodes[attend])) {
            return attend - i;
        }
        static std::atomic<bool> is_said = false;
        if (!is_said.exchange(true)) {
            const ggml_tensor * select = graph->nodes[i];
            GGML_LOG_INFO("fasa: %d heads, %d tokens and %d cells at once are more than device %d holds: several launches a layer\n",
                (int) select->ne[1], (int) (select->ne[2]*select->ne[3]), (int) select->src[3]->ne[0], ctx.device);
        }
    }
    return 0;
}

bool ggml_cuda_fasa_supported(int device, const ggml_tensor * dst) {
    return ggml_cuda_info().devices[device].cc >= GGML_CUDA_CC_TURING && fasa_supported(dst);
}

float ggml_cuda_fasa_bandwidth(int device) {
    const int id = ggml_cuda_info().devices[device].physical_device;
    int kilohertz = 0;
    int bits      = 0;
    if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, id) != cudaSuccess ||
        cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, id) != cudaSuccess) {
        (void) cudaGetLastError();
        return 0.0f;
    }
    return 2.0f*kilohertz*(bits/8)/1e6f; // twice a cycle
}
