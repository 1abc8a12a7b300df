// The threads of emulator.h: a fibre each, blocks one after another until they wait for others.
#include "emulator.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace {

constexpr size_t STACK = 64 << 10;
enum State { READY, WAITING, ASLEEP, DONE };

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = READY;
    Collective kind;
    unsigned mask, value, parameter, result;
};

struct Block {
    unsigned number;
    std::vector<Fibre> fibres;
    std::vector<char> shared;
    unsigned live;
};

ucontext_t scheduler;
sigjmp_buf out;
char message[200];
void (*kernel)(void*);
void* arguments;
Block* block;
unsigned lane_of_block;  // the thread that runs
unsigned random_state;

unsigned random_number() {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

[[noreturn]] void fail(const char* text) {
    snprintf(message, sizeof message, "block %u, thread %u: %s", blockIdx.x, lane_of_block, text);
    siglongjmp(out, 1);
}

void trapped(int) { fail("undefined behaviour: an index out of bounds, a shift too far, an integer overflow"); }
void faulted(int) { fail("memory that isn't there"); }

void start() {
    kernel(arguments);
    block->fibres[lane_of_block].state = DONE;
    block->live--;
}

// The results of one warp's collective, once all lanes of the mask are there.
void finish_warp(unsigned warp) {
    Fibre* lanes = &block->fibres[32 * warp];
    const Fibre& one = block->fibres[lane_of_block];
    for (int i = 0; i < 32; i++) {
        if (!(one.mask >> i & 1)) continue;
        if (lanes[i].state == DONE) fail("a lane has ended that its warp waits for");
        if (lanes[i].state != WAITING || lanes[i].kind == SYNCTHREADS) return;
        if (lanes[i].kind != one.kind || lanes[i].mask != one.mask || lanes[i].parameter != one.parameter)
            fail("lanes of a warp wait in different places");
    }
    unsigned most = 0, least = ~0u, sum = 0, ballot = 0;
    for (int i = 0; i < 32; i++)
        if (one.mask >> i & 1) {
            unsigned v = lanes[i].value;
            most = max(most, v), least = min(least, v), sum += v, ballot |= unsigned(v != 0) << i;
        }
    for (int i = 0; i < 32; i++) {
        if (!(one.mask >> i & 1)) continue;
        unsigned from = i;
        if (one.kind == SHFL) from = one.parameter;
        if (one.kind == SHFL_XOR) from = i ^ one.parameter;
        if (one.kind == SHFL_UP && i >= (int)one.parameter) from = i - one.parameter;
        switch (one.kind) {
        case SHFL:
        case SHFL_XOR:
        case SHFL_UP: lanes[i].result = lanes[from].value; break;
        case BALLOT: lanes[i].result = ballot; break;
        case REDUCE_MAX: lanes[i].result = most; break;
        case REDUCE_MIN: lanes[i].result = least; break;
        case REDUCE_ADD: lanes[i].result = sum; break;
        default: lanes[i].result = 0;
        }
        lanes[i].state = READY;
    }
}

void finish_block() {
    for (Fibre& f : block->fibres)
        if (f.state != DONE && (f.state != WAITING || f.kind != SYNCTHREADS)) return;
    for (Fibre& f : block->fibres)
        if (f.state == WAITING) f.state = READY;
}

// Runs the block's threads until all have ended, or wait for one that sleeps, which it wakes.
void advance() {
    const unsigned n = block->fibres.size();
    for (;;) {
        bool ran = false;
        unsigned at = random_number() % n, step = random_number() % 2 ? 1 : n - 1;
        for (unsigned i = 0; i < n; i++, at = (at + step) % n) {
            Fibre& f = block->fibres[at];
            if (f.state != READY) continue;
            ran = true;
            lane_of_block = at;
            threadIdx = {at, 0, 0};
            swapcontext(&scheduler, &f.context);
            if (f.state == DONE) finish_block();
        }
        if (!ran) break;
    }
    bool waits = false, slept = false;
    for (Fibre& f : block->fibres) {
        waits |= f.state == WAITING;
        if (f.state == ASLEEP) f.state = READY, slept = true;
    }
    if (waits && !slept) fail("threads wait for each other for ever");
}

void enter(Block& next) {
    block = &next;
    blockIdx = {next.number, 0, 0};
    if (next.fibres.empty()) {
        next.fibres.resize(blockDim.x);
        next.live = blockDim.x;
        next.shared.assign(__stop_cuda_shared - __start_cuda_shared, (char)0xa5);
        for (Fibre& f : next.fibres) {
            f.stack.reset(new char[STACK]);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = &scheduler;
            makecontext(&f.context, start, 0);
        }
    }
    memcpy(__start_cuda_shared, next.shared.data(), next.shared.size());
}

}  // namespace

unsigned collective(Collective kind, unsigned mask, unsigned value, unsigned parameter) {
    Fibre& f = block->fibres[lane_of_block];
    f.kind = kind, f.mask = mask, f.value = value, f.parameter = parameter, f.state = WAITING;
    if (kind == SLEEP)
        f.state = ASLEEP;
    else if (kind == SYNCTHREADS)
        finish_block();
    else if (!(mask >> lane_of_block % 32 & 1))
        fail("a lane waits for others and isn't in the mask");
    else
        finish_warp(lane_of_block / 32);
    swapcontext(&f.context, &scheduler);
    return f.result;
}

const char* run(void (*f)(void*), void* given, dim3 grid, unsigned threads, unsigned seed, bool cooperative) {
    std::vector<Block> blocks(grid.x);
    kernel = f, arguments = given, gridDim = grid, blockDim = {threads, 1, 1}, random_state = seed;
    for (unsigned i = 0; i < grid.x; i++) blocks[i].number = i;
    for (unsigned i = grid.x; i > 1; i--) std::swap(blocks[i - 1], blocks[random_number() % i]);
    auto ill = signal(SIGILL, trapped), trap = signal(SIGTRAP, trapped), segv = signal(SIGSEGV, faulted);
    const char* result = nullptr;
    if (sigsetjmp(out, 1)) {
        result = message;
    } else {
        size_t left = blocks.size();
        for (int idle = 0; left && idle < 100; idle++)  // sweeps in which nobody ended
            for (Block& b : blocks) {
                if (!b.fibres.empty() && !b.live) continue;
                enter(b);
                const unsigned before = b.live;
                for (int spins = 0; spins < (cooperative ? 1 : 100) && b.live; spins++) advance();
                if (b.live && !cooperative) fail("a block waits for another that may not run");
                if (b.live < before) idle = 0;
                b.shared.assign(__start_cuda_shared, __stop_cuda_shared);
                if (!b.live) left--, b.fibres.clear(), b.fibres.resize(1), b.fibres[0].state = DONE;
            }
        if (left) result = "blocks wait for each other for ever";
    }
    signal(SIGILL, ill), signal(SIGTRAP, trap), signal(SIGSEGV, segv);
    return result;
}
