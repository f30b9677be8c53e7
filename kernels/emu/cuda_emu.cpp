// The scheduler behind cuda_emu.h: fibers, block barriers, warp collectives, deadlock reports.
#include "cuda_emu.h"

#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

thread_local ThreadView* current = nullptr;

namespace {

constexpr size_t STACK = 64 * 1024;  // ample for kernels; a deeper one faults on its guard page
constexpr int MAX_THREADS = 1024;

// ---- the switch -----------------------------------------------------------------------------
#if defined(__x86_64__)
// System V: only rbx, rbp, r12-r15 and the stack pointer survive a call. swapcontext() would also
// save the signal mask, at two system calls a switch.
asm(R"(
.text
.p2align 4
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch,.-emu_switch
)");
extern "C" void emu_switch(void** save, void* to);
struct Context {
    void* sp = nullptr;
    void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
        auto top = reinterpret_cast<void**>(stack + bytes);
        *--top = nullptr;  // entry never returns; keeps rsp as a call would leave it
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        sp = top;
    }
    void switch_to(Context& next) { emu_switch(&sp, next.sp); }
};
#else
struct Context {
    ucontext_t uc;
    void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
        getcontext(&uc);
        uc.uc_stack.ss_sp = stack;
        uc.uc_stack.ss_size = bytes;
        uc.uc_link = nullptr;
        makecontext(&uc, entry, 0);
    }
    void switch_to(Context& next) { swapcontext(&uc, &next.uc); }
};
#endif

struct CopyOp { void* dst; const void* src; int bytes, src_bytes; };

struct Fiber : ThreadView {
    Context context;
    bool done = false;
    const char* waits_at = nullptr;
    std::vector<std::vector<CopyOp>> groups;  // committed cp.async groups, oldest first
    std::vector<CopyOp> open;                 // issued, not yet committed
};

struct Group { unsigned mask = 0, arrived = 0; const char* what = nullptr; };
struct Warp {
    WarpSlots slots;
    std::vector<Group> groups;  // disjoint masks may be in flight at once
    std::vector<int> order;     // its threads, in schedule order
};

// Pages that fault when the kernel runs past the end.
struct Guarded {
    unsigned char* base = nullptr;
    size_t bytes = 0, page = size_t(sysconf(_SC_PAGESIZE));
    void reserve(size_t want) {
        want = (want + page - 1) / page * page;
        if (want <= bytes) return;
        release();
        base = static_cast<unsigned char*>(
            mmap(nullptr, want + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (base == MAP_FAILED) { perror("cuda_emu: mmap"); abort(); }
        mprotect(base, page, PROT_NONE);
        mprotect(base + page + want, page, PROT_NONE);
        bytes = want;
    }
    void release() { if (bytes) munmap(base, bytes + 2 * page); bytes = 0; }
    unsigned char* end() const { return base + page + bytes; }
    ~Guarded() { release(); }
};

struct Engine {
    std::vector<Fiber> fibers{size_t(MAX_THREADS)};
    std::vector<Guarded> stacks{size_t(MAX_THREADS)};
    std::vector<Warp> warps{size_t(MAX_THREADS / WARP)};
    std::vector<int> queue, order;  // queue: ring of runnable fibers, at most one entry each
    size_t head = 0, queued = 0;
    Context main;
    Fiber* self = nullptr;
    int count = 0, live = 0, barrier_arrived = 0, reduce[3] = {0, 1, 0}, reduce_out[3];
    Guarded shared;
    unsigned shared_bytes = 0;
    void (*body)(const void* const*) = nullptr;
    const void* const* arguments = nullptr;
    std::string error;

    void release_barrier() {
        barrier_arrived = 0;
        std::memcpy(reduce_out, reduce, sizeof reduce);
        reduce[0] = 0, reduce[1] = 1, reduce[2] = 0;
        for (int i : order)
            if (!fibers[i].done) { fibers[i].waits_at = nullptr; push(i); }
    }
    void push(int i) { queue[(head + queued++) % queue.size()] = i; }
    bool pop(int& i) {
        if (!queued) return false;
        i = queue[head];
        head = (head + 1) % queue.size();
        --queued;
        return true;
    }
    // Leaves the running fiber for the next runnable one, or for main when none is left.
    void leave() {
        Fiber* from = self;
        int next;
        if (pop(next)) {
            if (&fibers[next] == from) return;
            self = &fibers[next];
            current = self;
            from->context.switch_to(self->context);
        } else {
            from->context.switch_to(main);
        }
    }
};
thread_local Engine* engine = nullptr;

void fiber_main() {
    Engine& e = *engine;
    e.body(e.arguments);
    async_commit();
    async_wait(0);
    e.self->done = true;
    --e.live;
    // Exited threads no longer count at a block barrier.
    if (e.live && e.barrier_arrived == e.live) e.release_barrier();
    e.leave();
    abort();
}

// Names the thread that touched a guard page or trapped in the sanitizer's checks, then lets the default action end the process. It runs on
// the alternate stack that Rust's runtime gives every thread.
void on_fault(int signal, siginfo_t* info, void*) {
    if (engine && current) {
        const ThreadView& t = *current;
        char text[200];
        int n = snprintf(text, sizeof text, "cuda_emu: %s at %p by block (%u,%u,%u) thread (%u,%u,%u)\n",
                         signal == SIGILL ? "misaligned, overflowing or out-of-bounds operation" : "invalid access",
                         info->si_addr, t.block_idx.x, t.block_idx.y, t.block_idx.z, t.thread_idx.x, t.thread_idx.y,
                         t.thread_idx.z);
        if (write(2, text, size_t(n)) < 0) abort();
    }
    std::signal(signal, SIG_DFL);
}

void install_fault_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, nullptr);
        sigaction(SIGBUS, &action, nullptr);
        sigaction(SIGILL, &action, nullptr);
    });
}

std::string describe_waiters(Engine& e) {
    std::string text;
    int shown = 0, waiting = 0;
    for (int i = 0; i < e.count; ++i) {
        Fiber& f = e.fibers[i];
        if (f.done) continue;
        ++waiting;
        if (shown++ < 4) text += " thread " + std::to_string(i) + " waits at " + (f.waits_at ? f.waits_at : "?") + ";";
    }
    return std::to_string(waiting) + " of " + std::to_string(e.count) + " threads wait, " +
           std::to_string(e.count - waiting) + " have exited:" + text;
}

void order_threads(Engine& e, unsigned schedule) {
    e.order.resize(e.count);
    for (int i = 0; i < e.count; ++i) e.order[i] = schedule == 1 ? e.count - 1 - i : i;
    uint64_t s = schedule * 0x9e3779b97f4a7c15ull;
    for (int i = e.count - 1; schedule > 1 && i > 0; --i) {
        s = s * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(e.order[i], e.order[(s >> 33) % unsigned(i + 1)]);
    }
    for (Warp& w : e.warps) w.groups.clear(), w.order.clear();
    for (int i : e.order) e.warps[i / WARP].order.push_back(i);
}

bool run_block(Engine& e, dim3 grid, dim3 block, uint3 index, unsigned schedule) {
    e.count = e.live = int(block.x * block.y * block.z);
    e.barrier_arrived = 0;
    e.reduce[0] = 0, e.reduce[1] = 1, e.reduce[2] = 0;
    e.head = e.queued = 0;
    e.queue.resize(e.count);
    // 0xff bytes are NaN in f32, bf16 and fp16: what nobody wrote shows in the result.
    if (e.shared_bytes) std::memset(dynamic_shared(), 0xff, e.shared_bytes);
    order_threads(e, schedule);
    for (int i : e.order) {
        Fiber& f = e.fibers[i];
        unsigned u = unsigned(i);
        f.thread_idx = {u % block.x, u / block.x % block.y, u / block.x / block.y};
        f.block_idx = index;
        f.block_dim = block;
        f.grid_dim = grid;
        f.linear = i;
        f.done = false;
        f.waits_at = nullptr;
        f.groups.clear();
        f.open.clear();
        e.stacks[i].reserve(STACK);
        f.context.prepare(e.stacks[i].end() - STACK, STACK, fiber_main);
        e.push(i);
    }
    int first = 0;
    e.pop(first);
    e.self = &e.fibers[first];
    current = e.self;
    e.main.switch_to(e.self->context);
    current = nullptr;
    if (e.error.empty() && e.live) e.error = "deadlock: " + describe_waiters(e);
    return e.error.empty();
}

const Entry* entries = nullptr;

}  // namespace

Entry::Entry(const char* name, const char* kinds, void (*call)(const void* const*))
    : name(name), kinds(kinds), call(call), next(entries) {
    entries = this;
}

void fail(const char* format, ...) {
    char text[256];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    Engine& e = *engine;
    e.error = text;
    e.queued = 0;
    e.leave();
    abort();
}

void block_barrier(const char* what) {
    Engine& e = *engine;
    if (++e.barrier_arrived < e.live) e.self->waits_at = what;
    else e.release_barrier();
    e.leave();
}

int block_reduce(int value, int kind) {
    Engine& e = *engine;
    e.reduce[0] |= value != 0;
    e.reduce[1] &= value != 0;
    e.reduce[2] += value;
    block_barrier("__syncthreads_*");
    return e.reduce_out[kind];
}

void warp_collective(unsigned mask, const char* what, const void* in, size_t in_size, void* out, size_t out_size,
                     Resolve resolve) {
    Engine& e = *engine;
    int me = e.self->linear, lane = me % WARP, base = me - lane;
    // The last warp of a block may be partial; the hardware ignores lanes that do not exist.
    if (e.count - base < WARP) mask &= (1u << (e.count - base)) - 1;
    if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask %08x", what, lane, mask);
    Warp& w = e.warps[base / WARP];
    Group* group = nullptr;
    for (Group& g : w.groups) {
        if (g.mask == mask) group = &g;
        else if (g.mask & mask) fail("%s: mask %08x overlaps mask %08x in flight at %s", what, mask, g.mask, g.what);
    }
    if (!group) {
        w.groups.push_back({mask, 0, what});
        group = &w.groups.back();
    }
    if (std::strcmp(group->what, what)) fail("thread %d is at %s while its warp is at %s", me, what, group->what);
    std::memcpy(w.slots.in[lane], in, in_size);
    group->arrived |= 1u << lane;
    if (group->arrived != mask) {
        e.self->waits_at = what;
        e.leave();
    } else {
        *group = w.groups.back();
        w.groups.pop_back();
        if (resolve) resolve(w.slots, mask);
        for (int i : w.order)
            if (mask >> (i - base) & 1) {
                e.fibers[i].waits_at = nullptr;
                e.push(i);
            }
        e.leave();
    }
    std::memcpy(out, w.slots.out[lane], out_size);
}

void* dynamic_shared() { return engine->shared.end() - (engine->shared_bytes + 15) / 16 * 16; }
unsigned dynamic_shared_bytes() { return engine->shared_bytes; }

void async_copy(void* dst, const void* src, int bytes, int src_bytes) {
    if (reinterpret_cast<uintptr_t>(dst) % bytes || (src_bytes && reinterpret_cast<uintptr_t>(src) % bytes))
        fail("cp.async of %d bytes: an address is not aligned to its size", bytes);
    engine->self->open.push_back({dst, src, bytes, src_bytes});
}
void async_commit() {
    Fiber& f = *engine->self;
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}
void async_wait(int groups_left) {
    Fiber& f = *engine->self;
    if (f.groups.size() <= size_t(groups_left)) return;
    size_t ready = f.groups.size() - size_t(groups_left);
    for (size_t g = 0; g < ready; ++g)
        for (const CopyOp& c : f.groups[g]) {
            std::memcpy(c.dst, c.src, size_t(c.src_bytes));
            std::memset(static_cast<char*>(c.dst) + c.src_bytes, 0, size_t(c.bytes - c.src_bytes));
        }
    f.groups.erase(f.groups.begin(), f.groups.begin() + long(ready));
}

}  // namespace emu

// ---- C interface for src/lib.rs ----------------------------------------------------------------
extern "C" {

struct EmuLaunch {
    unsigned grid[3], block[3];
    unsigned shared_bytes;
    unsigned schedule;  // 0 ascending, 1 descending (threads and blocks), n > 1: threads shuffled, seeded by n
};

// Runs the named kernel once for every thread of the launch. Returns 0, or 1 with a message.
int emu_launch(const EmuLaunch* l, const char* kernel, const char* kinds, const void* const* arguments, char* message,
               size_t message_bytes) {
    using namespace emu;
    static thread_local Engine mine;
    Engine& e = mine;
    install_fault_handler();
    engine = &e;
    e.error.clear();
    const Entry* entry = entries;
    while (entry && std::strcmp(entry->name, kernel)) entry = entry->next;
    dim3 grid(l->grid[0], l->grid[1], l->grid[2]), block(l->block[0], l->block[1], l->block[2]);
    uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    // Limits common to sm_80 and later (227 KiB is sm_90's opt-in maximum).
    if (!entry) e.error = std::string("no kernel is called ") + kernel;
    else if (std::strcmp(entry->kinds, kinds))
        e.error = std::string(kernel) + " takes (" + entry->kinds + "), launched with (" + kinds + ")";
    else if (threads == 0 || threads > MAX_THREADS || block.z > 64) e.error = "block dimensions out of range";
    else if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) e.error = "grid dimensions out of range";
    else if (l->shared_bytes > 227 * 1024) e.error = "more than 227 KiB of dynamic shared memory";
    if (e.error.empty()) {
        e.shared_bytes = l->shared_bytes;
        e.shared.reserve(l->shared_bytes + 16);
        e.body = entry->call;
        e.arguments = arguments;
        for (uint64_t i = 0; i < blocks; ++i) {
            uint64_t b = l->schedule == 1 ? blocks - 1 - i : i;
            uint3 index{unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
            if (!run_block(e, grid, block, index, l->schedule)) {
                e.error += " [block " + std::to_string(b) + "]";
                break;
            }
        }
    }
    engine = nullptr;
    snprintf(message, message_bytes, "%s", e.error.c_str());
    return !e.error.empty();
}

// Stand-in for device memory: its end (rounded up to 16 bytes) lies against a page that faults.
void* emu_alloc(size_t bytes) {
    emu::Guarded memory;
    memory.reserve(bytes + 16);
    void* start = memory.end() - (bytes + 15) / 16 * 16;
    memory.bytes = 0;  // now the caller's
    return start;
}
void emu_free(void* start, size_t bytes) {
    emu::Guarded memory;
    memory.bytes = (bytes + 16 + memory.page - 1) / memory.page * memory.page;
    auto end = static_cast<unsigned char*>(start) + (bytes + 15) / 16 * 16;
    memory.base = end - memory.bytes - memory.page;
}
}
