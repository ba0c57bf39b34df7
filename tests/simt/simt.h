// Runs GPU kernels on the CPU, to test them: blocks of threads one after the other, each thread a fiber that runs until it
// waits for others, at a barrier or for what a lane of its warp has to tell.
//
// Made to find faults, not to be fast. The order in which threads go on differs from block to block, so that a missing
// barrier changes results. Memory comes with pages around it that nobody may touch, shared memory with a canary behind
// it, both filled with rubbish. Threads that wait for one another for ever are an error that names them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

constexpr int    WARP       = 32;
constexpr size_t MAX_SHARED = 48*1024;
constexpr size_t CANARY     = 256;

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

// run a kernel in all threads of all blocks; does not return if a fault is found
// shared: [MAX_SHARED + CANARY] bytes, of which a block may use n_shared
void launch(const char * name, index3 n_blocks, unsigned n_threads, void * shared, size_t n_shared, const std::function<void()> & kernel);

// wait for all threads of the block
void sync_block();

// wait for all lanes of the warp; returns what each of them gave, valid until the next call
const uint64_t * exchange(uint64_t value);

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
