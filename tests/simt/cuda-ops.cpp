// The FASA ops by the very CUDA kernels, in the emulator.

#include "simt-ops.h"

#include "ggml-fasa/cuda/fasa-kernels.cuh"

#include <algorithm>
#include <list>
#include <vector>

// devices of different sizes, so that cells are dealt out in different ways; the same for the same shapes
static int32_t n_cores_for(const ggml_tensor * op) {
    static constexpr int32_t N_CORES[] = { 1, 3, 132 };
    return N_CORES[(op->src[1]->ne[2] + op->ne[1] + op->ne[2]) % 3];
}

// Of a launch whose blocks wait for one another all threads exist at once: a small device, with as little shared memory as a
// consumer card has, or much less.
static constexpr int32_t MAX_CORES_TOGETHER = 16;

static size_t max_shared_for(const ggml_tensor * op) {
    return op->ne[0] % 3 ? 99*1024 : 32*1024;
}

struct simt_launcher {
    const char * name;
    int32_t      n_cores;
    size_t       max_shared;

    std::list<simt::guarded> allocated;

    void * alloc(size_t size) {
        allocated.emplace_back(size);
        return allocated.back().data();
    }

    uint32_t * counters(size_t size) {
        static std::vector<uint32_t> res;
        res.resize(size/sizeof(uint32_t));
        GGML_ASSERT(std::count(res.begin(), res.end(), 0u) == (ptrdiff_t) res.size() && "a launch has left its counters dirty");
        return res.data();
    }

    template <typename... T>
    int32_t n_resident(void (*)(T...), size_t shared) { return shared <= max_shared ? 2*n_cores : 0; }

    template <typename... T, typename... U>
    void launch(void (*kernel)(T...), dim3 grid, size_t shared, U... args) {
        simt::launch(name, grid, FASA_THREADS, shared, [&] { kernel((T) args...); });
    }

    template <typename... T, typename... U>
    bool launch_together(void (*kernel)(T...), dim3 grid, size_t shared, U... args) {
        simt::launch_together(name, grid, FASA_THREADS, shared, 2*n_cores, [&] { kernel((T) args...); });
        return true;
    }
};

void simt_cuda_compute(const ggml_tensor * op) {
    simt_launcher launcher { ggml_op_name(op->op), n_cores_for(op), max_shared_for(op), {} };
    switch (op->op) {
        case GGML_OP_FASA_STORE:  fasa_launch_store (launcher, op); break;
        case GGML_OP_FASA_SELECT: fasa_launch_select(launcher, op); break;
        case GGML_OP_FASA_ATTEND: fasa_launch_attend(launcher, op); break;
        default: GGML_ABORT("no FASA op");
    }
}

bool simt_cuda_compute_both(const ggml_tensor * first, const ggml_tensor * second) {
    if (first->op == GGML_OP_SET_ROWS) {
        simt_launcher launcher { "SET_ROWS+FASA_STORE", n_cores_for(second), max_shared_for(second), {} };
        fasa_launch_store_and_copy(launcher, second, first);
        return true;
    }
    simt_launcher launcher { "FASA_SELECT+FASA_ATTEND", std::min(n_cores_for(second), MAX_CORES_TOGETHER), max_shared_for(second), {} };
    return fasa_launch_decode(launcher, first, second);
}
