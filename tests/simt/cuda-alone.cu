// The kernels need nothing of ggml-cuda: this compiles with CUDA and ggml.h alone.

#include "../../ggml_kernels/cuda/fasa-kernels.cuh"

struct plain_launcher {
    int32_t      n_cores;
    cudaStream_t stream;

    void * alloc(size_t size) {
        void * res = nullptr;
        cudaMallocAsync(&res, size, stream);
        return res;
    }

    template <typename... T, typename... U>
    void launch(void (*kernel)(T...), dim3 grid, size_t shared, U... args) {
        kernel<<<grid, FASA_THREADS, shared, stream>>>((T) args...);
    }
};

void compute(plain_launcher & launcher, const ggml_tensor * op) {
    fasa_launch_store (launcher, op);
    fasa_launch_select(launcher, op);
    fasa_launch_attend(launcher, op);
}
