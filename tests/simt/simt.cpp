#include "simt.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace simt {

static constexpr size_t  STACK      = 128*1024;
static constexpr size_t  CANARY     = 256;
static constexpr uint8_t RUBBISH    = 0xA5; // as f32 or f16 a small negative number, as an id far outside
static constexpr int     MAX_ROUNDS = 32; // as often may threads load again what has not changed, and go on

index3 thread_index;
index3 block_index;

namespace {

enum class waits_for { nothing, warp, block, memory, never };

// Which of the threads that can go on does: that which could last, or of new ones the first; any; any of the block that runs
// far ahead of the others, or is left behind by them; any of the first block, or warp, in some order, that has one.
enum class order { last, first, any, ahead, behind, blocks, warps };

struct fiber {
    char *    stack;
    jmp_buf   here {};
    bool      started = false;
    waits_for waiting = waits_for::never;

    // what it has loaded since something that anybody loads was written last
    std::vector<const void *> loaded;
    uint64_t                  n_written = 0;
};

struct warp {
    int      n_arrived = 0;
    uint64_t given[WARP];
    uint64_t known[WARP]; // what was given when the last one arrived
};

struct block {
    index3   index;
    unsigned n_arrived = 0;
    char *   shared = nullptr;
};

// what is known of a number in memory on which atomic operations work
struct word {
    bool is_loaded      = false;
    bool added_relaxed  = false;
    bool stored_relaxed = false;
};

// of the launch, or of one block of it
struct {
    const char * kernel = "none";
    const std::function<void()> * run = nullptr;

    std::vector<std::unique_ptr<fiber>> fibers; // those of a block in a row
    std::vector<warp>  warps;
    std::vector<block> blocks;
    std::vector<std::unique_ptr<char[]>> shared;
    size_t   n_shared  = 0;
    unsigned n_threads = 0; // of a block
    unsigned n_all     = 0;
    unsigned n_ended   = 0;
    unsigned current   = 0;

    simt::order           order = order::any;
    std::vector<uint32_t> ranks; // of warps: a higher one goes first

    std::vector<std::vector<unsigned>> ready; // by rank
    size_t   n_ready  = 0;
    uint32_t top_rank = 0; // no higher one has any ready

    std::unordered_map<const void *, word> words;
    std::vector<unsigned> sleeping;
    uint64_t n_written = 0;
    int      n_rounds  = 0; // in which all that could go on loaded what has not changed

    jmp_buf      scheduler;
    std::mt19937 rng { 1 };
} all;

[[noreturn]] void fail(const char * what) {
    fprintf(stderr, "simt: kernel %s, block (%u, %u, %u), thread %u: %s\n", all.kernel, block_index.x, block_index.y, block_index.z, thread_index.x, what);
    abort();
}

void on_fault(int number) {
    // not safe in a handler in general, but nothing is lost: the process ends here
    fail(number == SIGSEGV || number == SIGBUS ? "touches memory outside of its buffers, or writes to what it may only read"
                                               : "does what the language leaves undefined: alignment, shift or overflow");
}

// A stack takes as much memory as was ever used of it. Below the first ones is a page that nobody may touch; below all, that
// were more mappings than a process may have.
void make_fibers(size_t n) {
    static constexpr size_t N_AT_ONCE = 256;
    static constexpr size_t N_GUARDED = 1024;

    while (all.fibers.size() < n) {
        char * stacks = (char *) mmap(nullptr, N_AT_ONCE*STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) {
            perror("simt: mmap");
            abort();
        }
#ifdef MADV_NOHUGEPAGE
        madvise(stacks, N_AT_ONCE*STACK, MADV_NOHUGEPAGE);
#endif
        for (size_t i = 0; i < N_AT_ONCE; ++i) {
            if (all.fibers.size() < N_GUARDED) {
                mprotect(stacks + i*STACK, sysconf(_SC_PAGESIZE), PROT_NONE);
            }
            all.fibers.emplace_back(new fiber);
            all.fibers.back()->stack = stacks + i*STACK;
        }
    }
}

bool takes_any() { return all.order != order::last && all.order != order::first; }

void make_ready(unsigned begin, unsigned end) {
    for (unsigned i = begin; i < end; ++i) {
        const uint32_t rank = all.ranks[i/WARP];
        all.ready[rank].push_back(i);
        all.top_rank = std::max(all.top_rank, rank);
    }
    all.n_ready += end - begin;
}

unsigned take_ready() {
    while (all.ready[all.top_rank].empty()) {
        all.top_rank--;
    }
    std::vector<unsigned> & from = all.ready[all.top_rank];
    if (takes_any()) {
        std::swap(from[all.rng() % from.size()], from.back());
    }
    const unsigned res = from.back();
    from.pop_back();
    all.n_ready--;
    return res;
}

void wake_sleeping() {
    for (unsigned i : all.sleeping) {
        make_ready(i, i + 1);
    }
    all.sleeping.clear();
}

void wait(waits_for what) {
    fiber & self = *all.fibers[all.current];
    self.waiting = what;
    if (_setjmp(self.here) == 0) {
        _longjmp(all.scheduler, 1);
    }
}

// let others run
void yield() {
    make_ready(all.current, all.current + 1);
    if (!takes_any()) { // it would go on itself
        std::swap(all.ready[0].back(), all.ready[0][all.rng() % all.ready[0].size()]);
    }
    wait(waits_for::nothing);
}

void fiber_main() {
    for (;;) {
        (*all.run)();
        all.n_ended++;
        all.n_rounds = 0;
        wait(waits_for::never);
    }
}

void set_indices(unsigned thread) {
    all.current  = thread;
    thread_index = index3(thread % all.n_threads, 0, 0);
    block_index  = all.blocks[thread/all.n_threads].index;
}

void resume(unsigned i) {
    fiber & f = *all.fibers[i];
    set_indices(i);
    f.waiting = waits_for::nothing;
    if (_setjmp(all.scheduler) != 0) {
        return;
    }
    if (f.started) {
        _longjmp(f.here, 1);
    }
    f.started = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp   = f.stack;
    context.uc_stack.ss_size = STACK - i % 64*64; // else all would compete for the same lines of the CPU's caches
    context.uc_link          = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

// names the first thread that waits, best one that waits for memory: it is what the others wait for
[[noreturn]] void fail_waiting() {
    unsigned n[5] = {};
    unsigned first[5] = {};
    for (unsigned i = all.n_all; i-- > 0;) {
        const int waiting = (int) all.fibers[i]->waiting;
        n[waiting]++;
        first[waiting] = i;
    }
    const auto get = [&](waits_for what) { return n[(int) what]; };
    set_indices(first[(int) (get(waits_for::memory) ? waits_for::memory : get(waits_for::block) ? waits_for::block : waits_for::warp)]);

    char text[256];
    snprintf(text, sizeof(text), "waits for ever: %u threads wait for their block, %u for their warp, %u for memory, %u have ended",
        get(waits_for::block), get(waits_for::warp), get(waits_for::memory), get(waits_for::never));
    fail(text);
}

void make_ranks() {
    const size_t n_warps  = all.n_all/WARP;
    const size_t n_blocks = all.blocks.size();

    std::vector<uint32_t> shuffled(all.order == order::warps ? n_warps : n_blocks);
    std::iota(shuffled.begin(), shuffled.end(), 0);
    std::shuffle(shuffled.begin(), shuffled.end(), all.rng);

    all.ranks.assign(n_warps, 0);
    for (size_t i = 0; i < n_warps; ++i) {
        const uint32_t of_block = shuffled[i*n_blocks/n_warps];
        switch (all.order) {
            case order::ahead:  all.ranks[i] = of_block == 0; break;
            case order::behind: all.ranks[i] = of_block != 0; break;
            case order::blocks: all.ranks[i] = of_block;      break;
            case order::warps:  all.ranks[i] = shuffled[i];   break;
            default: break;
        }
    }
    all.ready.resize(std::max(all.ready.size(), shuffled.size() + 1));
    all.n_ready  = 0;
    all.top_rank = 0;
}

// those in all.blocks
void run_blocks() {
    all.n_all   = all.n_threads*all.blocks.size();
    all.n_ended = 0;
    make_fibers(all.n_all);
    all.warps.assign(all.n_all/WARP, warp());
    all.words.clear();
    all.n_written++; // nobody has loaded anything since
    all.n_rounds = 0;

    while (all.shared.size() < all.blocks.size()) {
        all.shared.emplace_back(new char[MAX_SHARED + CANARY]); // as any memory of this size on a multiple of 16
    }
    for (size_t i = 0; i < all.blocks.size(); ++i) {
        all.blocks[i].shared = all.shared[i].get();
        memset(all.blocks[i].shared, RUBBISH, all.n_shared + CANARY);
    }

    make_ranks();
    make_ready(0, all.n_all);
    if (all.order == order::first) {
        std::reverse(all.ready[0].begin(), all.ready[0].end());
    }
    while (all.n_ended < all.n_all) {
        if (all.n_ready == 0) {
            // who loads the same twice may have got what it wants both times
            if (all.sleeping.empty() || ++all.n_rounds > MAX_ROUNDS) {
                fail_waiting();
            }
            wake_sleeping();
        }
        resume(take_ready());
    }

    for (size_t i = 0; i < all.blocks.size(); ++i) {
        const auto * canary = (const uint8_t *) all.blocks[i].shared + all.n_shared;
        if (std::any_of(canary, canary + CANARY, [](uint8_t x) { return x != RUBBISH; })) {
            set_indices(i*all.n_threads);
            fail("this block writes behind its shared memory");
        }
    }
}

void launch_blocks(const char * name, index3 n_blocks, unsigned n_threads, size_t n_shared, bool together, size_t n_resident, const std::function<void()> & kernel) {
    all.kernel    = name;
    all.run       = &kernel;
    all.n_threads = n_threads;
    all.n_shared  = n_shared;
    thread_index  = index3(0, 0, 0);
    block_index   = index3(0, 0, 0);

    if (n_threads == 0 || n_threads % WARP != 0) {
        fail("the number of threads is no multiple of a warp");
    }
    if (n_shared > MAX_SHARED) {
        fail("too much shared memory");
    }
    if (n_blocks.x == 0 || n_blocks.y == 0 || n_blocks.y > 65535 || n_blocks.z != 1) {
        fail("no such grid");
    }

    std::vector<block> blocks((size_t) n_blocks.x*n_blocks.y);
    for (size_t i = 0; i < blocks.size(); ++i) {
        blocks[i].index = index3(i % n_blocks.x, i / n_blocks.x, 0);
    }
    if (together && blocks.size() > n_resident) {
        block_index = blocks[n_resident].index;
        char text[256];
        snprintf(text, sizeof(text), "the device holds %zu blocks at once, not all %zu that wait for one another; it would hang on a GPU", n_resident, blocks.size());
        fail(text);
    }
    std::shuffle(blocks.begin(), blocks.end(), all.rng);

    void (* before[4])(int);
    const int signals[4] = { SIGSEGV, SIGBUS, SIGILL, SIGTRAP };
    for (int i = 0; i < 4; ++i) {
        before[i] = signal(signals[i], on_fault);
    }

    if (together) {
        static constexpr order orders[] = { order::last, order::first, order::any, order::ahead, order::behind, order::blocks, order::warps };
        all.order  = orders[all.rng() % 7];
        all.blocks = blocks;
        run_blocks();
    } else {
        static constexpr order orders[] = { order::last, order::first, order::any, order::warps };
        for (const block & b : blocks) {
            all.order = orders[all.rng() % 4];
            all.blocks.assign(1, b);
            run_blocks();
        }
    }

    for (int i = 0; i < 4; ++i) {
        signal(signals[i], before[i]);
    }
}

// something happened other than that a thread waits for memory
void note_written(const word & w) {
    all.n_rounds = 0;
    if (w.is_loaded) {
        all.n_written++;
        wake_sleeping();
    }
}

} // namespace

void * shared_memory() { return all.blocks[all.current/all.n_threads].shared; }

void sync_block() {
    const unsigned i = all.current/all.n_threads;

    all.n_rounds = 0;
    if (++all.blocks[i].n_arrived == all.n_threads) {
        all.blocks[i].n_arrived = 0;
        make_ready(i*all.n_threads, (i + 1)*all.n_threads);
    }
    wait(waits_for::block);
}

const uint64_t * exchange(uint64_t value) {
    const unsigned i = all.current;

    warp & w = all.warps[i/WARP];
    all.n_rounds = 0;
    w.given[i % WARP] = value;
    if (++w.n_arrived == WARP) {
        w.n_arrived = 0;
        std::copy_n(w.given, WARP, w.known);
        make_ready(i/WARP*WARP, i/WARP*WARP + WARP);
    }
    wait(waits_for::warp);
    return w.known;
}

void before_atomic_load(const void * p, bool acquire) {
    fiber & self = *all.fibers[all.current];
    word  & w    = all.words[p]; // stays where it is until the launch ends
    w.is_loaded  = true;

    const auto is_known = [&] {
        if (self.n_written != all.n_written) {
            self.n_written = all.n_written;
            self.loaded.clear();
        }
        return std::find(self.loaded.begin(), self.loaded.end(), p) != self.loaded.end();
    };
    if (!is_known()) {
        yield();
    } else if (acquire) {
        all.sleeping.push_back(all.current);
        wait(waits_for::memory);
    } else {
        fail("waits without acquire: it may see less than what was written before");
    }
    if (!is_known()) {
        self.loaded.push_back(p);
    }
    if (acquire && w.added_relaxed) {
        fail("waits for what was added without release");
    }
    if (acquire && w.stored_relaxed) {
        fail("waits for what was stored without release");
    }
}

void after_atomic_add(const void * p, bool acquire, bool release) {
    word & w = all.words[p];
    if (acquire && w.added_relaxed) {
        fail("acquires what was added without release");
    }
    w.added_relaxed |= !release; // for good: those that release speak for themselves only
    note_written(w);
    if (all.rng() % 2) {
        yield();
    }
}

void after_atomic_store(const void * p, bool release, bool is_zero) {
    word & w = all.words[p];
    w.added_relaxed  = false;
    w.stored_relaxed = !release && !is_zero; // a zero is no news: it makes a counter ready
    note_written(w);
    if (all.rng() % 2) {
        yield();
    }
}

void after_plain_atomic(const void * p) {
    if (all.blocks.size() > 1) { // else there is nobody to wait for it
        word & w = all.words[p];
        w.added_relaxed = true;
        note_written(w);
    }
}

void launch(const char * name, index3 n_blocks, unsigned n_threads, size_t n_shared, const std::function<void()> & kernel) {
    launch_blocks(name, n_blocks, n_threads, n_shared, false, 0, kernel);
}

void launch_together(const char * name, index3 n_blocks, unsigned n_threads, size_t n_shared, size_t n_resident, const std::function<void()> & kernel) {
    launch_blocks(name, n_blocks, n_threads, n_shared, true, n_resident, kernel);
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
