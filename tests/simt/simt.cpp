#include "simt.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace simt {

static constexpr size_t  STACK   = 128*1024;
static constexpr uint8_t RUBBISH = 0xA5; // as f32 or f16 a small negative number, as an id far outside

index3 thread_index;
index3 block_index;

namespace {

enum class waits_for { nothing, warp, block, never };

struct fiber {
    std::unique_ptr<char[]> stack { new char[STACK] };

    ucontext_t context {};
    jmp_buf    here {};
    bool       started = false;
    waits_for  waiting = waits_for::never;
};

struct warp {
    int      n_arrived = 0;
    uint64_t given[WARP];
    uint64_t known[WARP]; // what was given when the last one arrived
};

// one block at a time
struct {
    const char * kernel = "none";
    const std::function<void()> * run = nullptr;

    std::vector<std::unique_ptr<fiber>> fibers;
    std::vector<warp>     warps;
    std::vector<unsigned> ready;
    unsigned current   = 0;
    unsigned n_threads = 0;
    unsigned n_arrived = 0;
    unsigned n_ended   = 0;

    jmp_buf      scheduler;
    std::mt19937 rng { 1 };
} block;

[[noreturn]] void fail(const char * what) {
    fprintf(stderr, "simt: kernel %s, block (%u, %u, %u), thread %u: %s\n", block.kernel, block_index.x, block_index.y, block_index.z, block.current, what);
    abort();
}

void on_fault(int number) {
    // not safe in a handler in general, but nothing is lost: the process ends here
    fail(number == SIGSEGV || number == SIGBUS ? "touches memory outside of its buffers, or writes to what it may only read"
                                               : "does what the language leaves undefined: alignment, shift or overflow");
}

void wait(waits_for what) {
    fiber & self = *block.fibers[block.current];
    self.waiting = what;
    if (_setjmp(self.here) == 0) {
        _longjmp(block.scheduler, 1);
    }
}

void fiber_main() {
    for (;;) {
        (*block.run)();
        block.n_ended++;
        wait(waits_for::never);
    }
}

void resume(unsigned i) {
    fiber & f = *block.fibers[i];
    block.current = i;
    thread_index  = index3(i, 0, 0);
    f.waiting     = waits_for::nothing;
    if (_setjmp(block.scheduler) != 0) {
        return;
    }
    if (f.started) {
        _longjmp(f.here, 1);
    }
    f.started = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp   = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link          = nullptr;
    makecontext(&f.context, fiber_main, 0);
    setcontext(&f.context);
}

void make_ready(unsigned begin, unsigned end) {
    for (unsigned i = begin; i < end; ++i) {
        block.ready.push_back(i);
    }
}

[[noreturn]] void fail_waiting() {
    unsigned n[4] = {};
    for (unsigned i = 0; i < block.n_threads; ++i) {
        n[(int) block.fibers[i]->waiting]++;
    }
    char text[256];
    snprintf(text, sizeof(text), "%u threads wait for their block, %u for their warp, %u have ended", n[(int) waits_for::block], n[(int) waits_for::warp], n[(int) waits_for::never]);
    fail(text);
}

// the order among threads that could go on: whichever was last, first, or any
void run_block(int order) {
    block.n_arrived = 0;
    block.n_ended   = 0;
    block.ready.clear();
    std::fill(block.warps.begin(), block.warps.end(), warp());
    make_ready(0, block.n_threads);
    if (order == 1) {
        std::reverse(block.ready.begin(), block.ready.end());
    }
    while (block.n_ended < block.n_threads) {
        if (block.ready.empty()) {
            fail_waiting();
        }
        if (order == 2) {
            std::swap(block.ready[block.rng() % block.ready.size()], block.ready.back());
        }
        const unsigned next = block.ready.back();
        block.ready.pop_back();
        resume(next);
    }
}

} // namespace

void sync_block() {
    if (++block.n_arrived == block.n_threads) {
        block.n_arrived = 0;
        make_ready(0, block.n_threads);
    }
    wait(waits_for::block);
}

const uint64_t * exchange(uint64_t value) {
    const unsigned i = block.current;

    warp & w = block.warps[i/WARP];
    w.given[i % WARP] = value;
    if (++w.n_arrived == WARP) {
        w.n_arrived = 0;
        std::copy_n(w.given, WARP, w.known);
        make_ready(i/WARP*WARP, i/WARP*WARP + WARP);
    }
    wait(waits_for::warp);
    return w.known;
}

void launch(const char * name, index3 n_blocks, unsigned n_threads, void * shared, size_t n_shared, const std::function<void()> & kernel) {
    block.kernel    = name;
    block.run       = &kernel;
    block.n_threads = n_threads;

    if (n_threads == 0 || n_threads % WARP != 0) {
        fail("the number of threads is no multiple of a warp");
    }
    if (n_shared > MAX_SHARED) {
        fail("too much shared memory");
    }
    if (n_blocks.x == 0 || n_blocks.y == 0 || n_blocks.y > 65535 || n_blocks.z != 1) {
        fail("no such grid");
    }
    while (block.fibers.size() < n_threads) {
        block.fibers.emplace_back(new fiber);
    }
    block.warps.resize(n_threads/WARP);
    block.ready.reserve(n_threads);

    void (* before[4])(int);
    const int signals[4] = { SIGSEGV, SIGBUS, SIGILL, SIGTRAP };
    for (int i = 0; i < 4; ++i) {
        before[i] = signal(signals[i], on_fault);
    }

    std::vector<unsigned> order((size_t) n_blocks.x*n_blocks.y);
    for (size_t i = 0; i < order.size(); ++i) {
        order[i] = i;
    }
    std::shuffle(order.begin(), order.end(), block.rng);

    for (unsigned i : order) {
        memset(shared, RUBBISH, n_shared + CANARY);
        block_index = index3(i % n_blocks.x, i / n_blocks.x, 0);
        run_block(block.rng() % 3);
        const auto * canary = (const uint8_t *) shared + n_shared;
        if (std::any_of(canary, canary + CANARY, [](uint8_t x) { return x != RUBBISH; })) {
            fail("writes behind its shared memory");
        }
    }

    for (int i = 0; i < 4; ++i) {
        signal(signals[i], before[i]);
    }
}

guarded::guarded(size_t size, size_t offset) {
    const size_t page = sysconf(_SC_PAGESIZE);

    // begins where its offset asks, ends as near to the page behind it as that allows
    const size_t padded = offset % 16 + size;
    n_pages = (padded + 15)/16*16;
    const size_t inner = (n_pages + page - 1)/page*page;

    pages = (char *) mmap(nullptr, inner + 2*page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + page, inner, PROT_READ | PROT_WRITE) != 0) {
        perror("simt: mmap");
        abort();
    }
    begin   = pages + page + inner - n_pages + offset % 16;
    n_pages = inner + 2*page;
    memset(pages + page, RUBBISH, inner);
}

guarded::~guarded() {
    munmap(pages, n_pages);
}

void guarded::make_read_only() {
    const size_t page = sysconf(_SC_PAGESIZE);
    mprotect(pages + page, n_pages - 2*page, PROT_READ);
}

} // namespace simt
