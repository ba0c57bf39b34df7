// Runs GPU kernels on the CPU, to test them: each thread is a fiber that runs until it waits for others, at a barrier, for
// what a lane of its warp has to tell, or for a number in memory. Blocks run one after the other, or, where they wait for
// one another, all together.
//
// Made to find faults, not to be fast. The order in which threads go on differs from block to block and from launch to
// launch, so that a missing barrier changes results. Memory comes with pages around it that nobody may touch, shared memory
// with a canary behind it, both filled with rubbish. Threads that wait for one another for ever are an error that names
// them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

constexpr int    WARP       = 32;
constexpr size_t MAX_SHARED = 227*1024;

struct index3 {
    unsigned x = 1;
    unsigned y = 1;
    unsigned z = 1;

    index3() = default;
    index3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// of the thread that runs
extern index3 thread_index;
extern index3 block_index;

// run a kernel in all threads of all blocks, one block after the other; does not return if a fault is found
void launch(const char * name, index3 n_blocks, unsigned n_threads, size_t n_shared, const std::function<void()> & kernel);

// the same with all blocks at once, so that they may wait for one another; n_resident: blocks that the device holds at once
void launch_together(const char * name, index3 n_blocks, unsigned n_threads, size_t n_shared, size_t n_resident, const std::function<void()> & kernel);

// of the block whose thread runs: the n_shared bytes of its launch, on a multiple of 16
void * shared_memory();

// wait for all threads of the block
void sync_block();

// wait for all lanes of the warp; returns what each of them gave, valid until the next call
const uint64_t * exchange(uint64_t value);

// Atomic operations happen as they are written, for no thread is interrupted; these tell of them. Where they wait for nothing
// others may run all the same. A thread that loads again what nobody has written since sleeps until somebody does.
void before_atomic_load(const void * p, bool acquire);
void after_atomic_add  (const void * p, bool acquire, bool release); // or any other that reads and writes
void after_atomic_store(const void * p, bool release, bool is_zero);
void after_plain_atomic(const void * p);                             // CUDA's own are relaxed; others do not run here

// memory which stops the process where anything beyond it is touched
class guarded {
public:
    // offset: of the first byte to a multiple of 16
    explicit guarded(size_t size, size_t offset = 0);
    ~guarded();

    guarded(const guarded &) = delete;
    guarded & operator=(const guarded &) = delete;

    void * data() const { return begin; }
    void   make_read_only();

private:
    char * pages;
    size_t n_pages;
    char * begin;
};

} // namespace simt
