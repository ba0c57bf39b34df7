// Whether the emulator finds the faults of blocks that wait for one another, for tests/test_simt.py: a kernel that has none,
// and the same one with each of them.

#include <cuda_runtime.h>
#include <cuda/atomic>

#include <vector>

namespace {

constexpr int N_BLOCKS   = 6;
constexpr int N_THREADS  = 64;
constexpr int N_PHASES   = 3;
constexpr int N_LAUNCHES = 50; // each in another order

enum class arrives { with_release, relaxed, plainly, relaxed_for_one };

struct options {
    const char * name;

    bool    meets         = true;
    bool    syncs_before  = true;
    bool    syncs_after   = true;
    bool    acquires      = true;
    int     n_missing     = 0; // blocks that are not waited for
    arrives how           = arrives::with_release;
    size_t  n_shared_less = 0;
    int     n_resident    = N_BLOCKS;
    bool    together      = true;
};

std::vector<options> all_options() {
    std::vector<options> res;
    const auto add = [&](const char * name) -> options & {
        res.push_back({ name });
        return res.back();
    };
    add("meet");
    add("missing barrier").meets = false;
    add("missing __syncthreads before arriving").syncs_before = false;
    add("missing __syncthreads after waiting").syncs_after = false;
    add("count too small").n_missing = 1;
    add("count too large").n_missing = -1;
    add("no release").how = arrives::relaxed;
    add("no release, atomicAdd").how = arrives::plainly;
    add("no release by one block").how = arrives::relaxed_for_one;
    add("no acquire").acquires = false;
    add("too little shared memory").n_shared_less = sizeof(uint32_t);
    add("too many blocks").n_resident = N_BLOCKS - 1;
    add("one after the other").together = false;
    return res;
}

void meet(const options & o, uint32_t & count, int phase) {
    if (o.syncs_before) {
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const cuda::atomic_ref<uint32_t, cuda::thread_scope_device> arrived(count);
        if (o.how == arrives::plainly) {
            atomicAdd(&count, 1);
        } else if (o.how == arrives::relaxed || (o.how == arrives::relaxed_for_one && blockIdx.x == 1)) {
            arrived.fetch_add(1, cuda::memory_order_relaxed);
        } else {
            arrived.fetch_add(1, cuda::memory_order_release);
        }
        while (arrived.load(o.acquires ? cuda::memory_order_acquire : cuda::memory_order_relaxed) + o.n_missing < (uint32_t) phase*N_BLOCKS) {
        }
    }
    if (o.syncs_after) {
        __syncthreads();
    }
}

// what a thread makes of a number of its warp and of one of each other warp of its block
uint32_t step(uint32_t of_warp, uint32_t of_block) { return 31*of_warp + 7*of_block + 1; }

// numbers: [N_PHASES][N_BLOCKS][N_THREADS], of which a phase reads what another block wrote in the one before
void kernel(const options & o, uint32_t * numbers, uint32_t & count) {
    uint32_t * shared = (uint32_t *) FASA_SHARED_MEMORY;

    const int block = blockIdx.x;
    const int i     = threadIdx.x;

    numbers[block*N_THREADS + i] = 1000*block + i;
    for (int phase = 1; phase < N_PHASES; ++phase) {
        if (o.meets) {
            meet(o, count, phase);
        }
        const uint32_t * from = numbers + ((phase - 1)*N_BLOCKS + (block + phase)%N_BLOCKS)*N_THREADS;
        const uint32_t   x    = __ldcg(from + (i + 1)%N_THREADS);

        __syncthreads(); // shared is read no more
        shared[i] = x;
        __syncthreads();
        numbers[(phase*N_BLOCKS + block)*N_THREADS + i] = step(__shfl_xor_sync(0xFFFFFFFFu, x, 5), shared[(i + 32)%N_THREADS]);
        __syncwarp();
    }
}

std::vector<uint32_t> expected() {
    std::vector<uint32_t> res(N_PHASES*N_BLOCKS*N_THREADS);
    for (int at = 0; at < (int) res.size(); ++at) {
        const int phase = at/N_THREADS/N_BLOCKS;
        const int block = at/N_THREADS%N_BLOCKS;
        const int i     = at%N_THREADS;

        const auto read = [&](int i) { return res[((phase - 1)*N_BLOCKS + (block + phase)%N_BLOCKS)*N_THREADS + (i + 1)%N_THREADS]; };
        res[at] = phase == 0 ? 1000*block + i : step(read(i^5), read((i + 32)%N_THREADS));
    }
    return res;
}

} // namespace

// how many launches give another result than they should
extern "C" int simt_selftest(const char * name) {
    for (const options & o : all_options()) {
        if (name != std::string(o.name)) {
            continue;
        }
        int res = 0;
        for (int i = 0; i < N_LAUNCHES; ++i) {
            const std::vector<uint32_t> right = expected();
            const simt::guarded numbers(right.size()*sizeof(uint32_t));
            const simt::guarded count(sizeof(uint32_t));
            *(uint32_t *) count.data() = 0;

            const size_t n_shared = N_THREADS*sizeof(uint32_t) - o.n_shared_less;
            const auto   run      = [&] { kernel(o, (uint32_t *) numbers.data(), *(uint32_t *) count.data()); };
            if (o.together) {
                simt::launch_together(o.name, N_BLOCKS, N_THREADS, n_shared, o.n_resident, run);
            } else {
                simt::launch(o.name, N_BLOCKS, N_THREADS, n_shared, run);
            }
            res += memcmp(numbers.data(), right.data(), right.size()*sizeof(uint32_t)) != 0;
        }
        return res;
    }
    return -1; // no such test
}
