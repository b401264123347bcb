// The scheduler of the threads of a block, warp operations, and device memory between unmapped
// pages. What is emulated, and what is not, stands in include/cuda_runtime.h.

#include "emulation.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t STACK = 256 * 1024;
constexpr size_t ARENA = size_t(1) << 36;  // of addresses; memory is used only where it is touched
constexpr size_t GAP = size_t(1) << 24;    // unmapped, between two allocations
constexpr size_t SHARED_MAX = __CUDA_ARCH__ >= 750 ? 99 * 1024 : 48 * 1024;
constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;

Settings settings;
sigjmp_buf * on_error;
char message[1024];

// ---- fibers ---------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
using Context = void *;  // its stack pointer; everything else is on the stack

extern "C" void emu_switch(Context * from, Context to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
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
.size emu_switch, .-emu_switch
)");

void prepare(Context & context, char * stack, void (*entry)()) {
    void ** top = reinterpret_cast<void **>(stack + STACK);
    *--top = nullptr;  // what `entry` would return to; it keeps the stack aligned as after a call
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; ++i) {
        *--top = nullptr;
    }
    context = top;
}

void switch_to(Context & from, Context & to) { emu_switch(&from, to); }
#else
using Context = ucontext_t;

void prepare(Context & context, char * stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

void switch_to(Context & from, Context & to) { swapcontext(&from, &to); }
#endif

enum class State { ready, at_barrier, at_warp, ended };

struct Fiber {
    uint3 thread;
    int lane;
    Context context;
    char * stack = nullptr;
    State state;
    const char * file;  // where it waits
    int line;
    unsigned mask;
    WarpOp op;
    uint64_t value, result;
    int source;
    void (*call)(void * const *);
};

struct Block {
    void (*thread)(void *);
    void * argument;
    std::vector<unsigned> ready;
    unsigned count = 0, ended = 0, waiting = 0;
};

std::vector<Fiber> fibers;
Fiber * current;
Context scheduler;
Block block;
const char * kernel_name = "a kernel";
int64_t kernel_threads;
size_t shared_size, static_size, shared_limit = 48 * 1024;
void * shared_data;

struct SharedVariable {
    const char * file;
    int line;
    void * data;
    size_t size;
};
std::vector<SharedVariable> shared_variables;

// ---- memory ---------------------------------------------------------------------------------------

struct Allocation {
    std::string name;
    char * data;
    size_t size;
    char * begin;  // of its pages
    char * end;
    Kind kind;
};

char * arena;
size_t arena_used;
std::vector<Allocation> allocations;

void fill(char * from, char * to) {
    const unsigned char * pattern = reinterpret_cast<const unsigned char *>(&settings.poison);
    for (char * at = from; at < to; ++at) {
        *at = static_cast<char>(pattern[reinterpret_cast<uintptr_t>(at) % 4]);
    }
}

void check_untouched(const Allocation & a, const char * from, const char * to) {
    const unsigned char * pattern = reinterpret_cast<const unsigned char *>(&settings.poison);
    for (const char * at = from; at < to; ++at) {
        if (static_cast<unsigned char>(*at) != pattern[reinterpret_cast<uintptr_t>(at) % 4]) {
            fail("written outside of `%s` (%zu bytes): byte %td", a.name.c_str(), a.size,
                 at - a.data);
        }
    }
}

void check_surroundings(const Allocation & a) {
    check_untouched(a, a.begin, a.data);
    check_untouched(a, a.data + a.size, a.end);
}

void release_all() {
    for (const Allocation & a : allocations) {
        madvise(a.begin, a.end - a.begin, MADV_DONTNEED);
        mprotect(a.begin, a.end - a.begin, PROT_NONE);
    }
    allocations.clear();
    arena_used = 0;
}

const Allocation * nearest(const char * address) {
    const Allocation * best = nullptr;
    ptrdiff_t distance = PTRDIFF_MAX;
    for (const Allocation & a : allocations) {
        const ptrdiff_t d = address < a.data ? a.data - address
                          : address >= a.data + a.size ? address - (a.data + a.size) + 1 : 0;
        if (d < distance) {
            best = &a;
            distance = d;
        }
    }
    return best;
}

// ---- errors ---------------------------------------------------------------------------------------

[[noreturn]] void raise_error() {
    if (on_error == nullptr) {
        fprintf(stderr, "emulation: %s\n", message);
        abort();
    }
    siglongjmp(*on_error, 1);
}

void add_place() {
    const size_t used = strlen(message);
    if (current != nullptr) {
        const uint3 & t = current->thread;
        snprintf(message + used, sizeof(message) - used,
                 "; %s, thread (%u,%u,%u) of block (%u,%u,%u)", kernel_name, t.x, t.y, t.z,
                 blockIdx.x, blockIdx.y, blockIdx.z);
    }
}

void on_fault(int signal, siginfo_t * info, void * context) {
    const char * address = static_cast<const char *>(info->si_addr);
    const char * what = "accessed";
#if defined(__x86_64__)
    const greg_t * registers = static_cast<const ucontext_t *>(context)->uc_mcontext.gregs;
    what = registers[REG_ERR] & 2 ? "written" : "read";
#endif
    const Allocation * a = nearest(address);
    if (signal != SIGSEGV || address < arena || address >= arena + ARENA || a == nullptr) {
        snprintf(message, sizeof(message), "signal %d at address %p, which is far from all memory",
                 signal, info->si_addr);
    } else if (address >= a->data && address < a->data + a->size) {
        snprintf(message, sizeof(message), "`%s`, an input, is written at byte %td",
                 a->name.c_str(), address - a->data);
    } else {
        snprintf(message, sizeof(message), "%s outside of `%s` (%zu bytes): byte %td", what,
                 a->name.c_str(), a->size, address - a->data);
    }
    add_place();
    raise_error();
}

// ---- scheduling -----------------------------------------------------------------------------------

uint64_t random_state;

uint64_t draw() {
    random_state += 0x9E3779B97F4A7C15u;
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Which of `count` things that wait in order is next.
size_t choose(size_t count) {
    return settings.schedule == 0 ? 0 : settings.schedule == 1 ? count - 1 : draw() % count;
}

std::vector<unsigned> order_of(unsigned count) {
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) {
        order[i] = settings.schedule == 1 ? count - 1 - i : i;
    }
    for (unsigned i = count; settings.schedule > 1 && i > 1; --i) {
        std::swap(order[i - 1], order[draw() % i]);
    }
    return order;
}

[[noreturn]] void fiber_main() {
    block.thread(block.argument);
    current->state = State::ended;
    switch_to(current->context, scheduler);
    abort();  // an ended thread is never resumed
}

void wait(State state, const char * file, int line) {
    current->state = state;
    current->file = file;
    current->line = line;
    switch_to(current->context, scheduler);
}

void make_ready(unsigned index) {
    fibers[index].state = State::ready;
    block.ready.push_back(index);
}

std::string place_of(const Fiber & f) {
    const char * slash = strrchr(f.file, '/');
    return std::string(slash ? slash + 1 : f.file) + ":" + std::to_string(f.line);
}

void release_barrier() {
    if (block.waiting == 0 || block.waiting + block.ended < block.count) {
        return;
    }
    Fiber * first = nullptr;
    for (unsigned i = 0; i < block.count; ++i) {
        Fiber & f = fibers[i];
        if (f.state == State::at_barrier) {
            first = first ? first : &f;
            if (f.file != first->file || f.line != first->line) {
                current = &f;
                fail("barrier divergence: thread (%u,%u,%u) is at the barrier of %s, this one at %s",
                     first->thread.x, first->thread.y, first->thread.z,
                     place_of(*first).c_str(), place_of(f).c_str());
            }
        }
    }
    if (block.ended > 0) {
        current = first;
        fail("barrier divergence: %u of %u threads have ended while others wait at %s",
             block.ended, block.count, place_of(*first).c_str());
    }
    uint64_t count = 0;
    for (unsigned i = 0; i < block.count; ++i) {
        count += fibers[i].value;
    }
    for (unsigned i = 0; i < block.count; ++i) {
        fibers[i].result = count;
        make_ready(i);
    }
    block.waiting = 0;
}

uint64_t combine(const Fiber & f, unsigned begin, unsigned mask) {
    uint64_t result = f.op == WarpOp::all || f.op == WarpOp::bit_and ? UINT64_MAX : 0;
    bool first = true;
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(mask >> lane & 1)) {
            continue;
        }
        const uint64_t value = fibers[begin + lane].value;
        const int64_t number = static_cast<int64_t>(value), sofar = static_cast<int64_t>(result);
        switch (f.op) {
            case WarpOp::any: result |= value != 0; break;
            case WarpOp::all: result &= value != 0; break;
            case WarpOp::ballot: result |= static_cast<uint64_t>(value != 0) << lane; break;
            case WarpOp::add: result += value; break;
            case WarpOp::min: result = first || number < sofar ? value : result; break;
            case WarpOp::max: result = first || number > sofar ? value : result; break;
            case WarpOp::bit_and: result &= value; break;
            case WarpOp::bit_or: result |= value; break;
            default: break;
        }
        first = false;
    }
    return result;
}

uint64_t shuffled(Fiber & f, unsigned begin, unsigned mask) {
    const unsigned source = begin + static_cast<unsigned>(f.source);
    if (!(mask >> f.source & 1)) {
        current = &f;
        fail("the value of lane %d is asked for at %s, and that thread %s", f.source,
             place_of(f).c_str(), source >= block.count ? "does not exist"
             : fibers[source].state == State::ended ? "has ended" : "is not in the mask");
    }
    return fibers[source].value;
}

void call_together(const Fiber & one, unsigned begin, unsigned present) {
    if (present != 0xFFFFFFFF) {
        fail("only the lanes 0x%08x are at %s, which needs all", present, place_of(one).c_str());
    }
    void * lanes[WARP];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        lanes[lane] = reinterpret_cast<void *>(fibers[begin + lane].value);
    }
    one.call(lanes);
}

// Lets the warp operation at which thread `index` waits happen, if all that take part are there.
void release_warp(unsigned index) {
    const unsigned begin = index / WARP * WARP;
    const Fiber & one = fibers[index];
    unsigned present = 0;
    for (unsigned lane = 0; lane < WARP && begin + lane < block.count; ++lane) {
        const Fiber & f = fibers[begin + lane];
        if (!(one.mask >> lane & 1) || f.state == State::ended) {
            continue;
        }
        if (f.state != State::at_warp || f.op != one.op || f.mask != one.mask ||
            f.line != one.line || f.file != one.file) {
            return;
        }
        present |= 1u << lane;
    }
    if (one.op == WarpOp::call) {
        call_together(one, begin, present);
    }
    const uint64_t combined = one.op == WarpOp::shuffle ? 0 : combine(one, begin, present);
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (present >> lane & 1) {
            Fiber & f = fibers[begin + lane];
            f.result = f.op == WarpOp::shuffle ? shuffled(f, begin, present) : combined;
        }
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (present >> lane & 1) {
            make_ready(begin + lane);
        }
    }
}

// A thread ended: others of its warp may have waited for nobody else.
void release_after_end(unsigned index) {
    const unsigned begin = index / WARP * WARP;
    for (unsigned i = begin; i < begin + WARP && i < block.count; ++i) {
        if (fibers[i].state == State::at_warp) {
            release_warp(i);
        }
    }
}

[[noreturn]] void report_deadlock() {
    std::string where;
    for (unsigned i = 0; i < block.count; ++i) {
        const Fiber & f = fibers[i];
        if (f.state == State::at_warp || f.state == State::at_barrier) {
            const std::string place = (f.state == State::at_warp ? " a warp operation of "
                                                                 : " the barrier of ") + place_of(f);
            if (where.find(place) == std::string::npos) {
                where += (where.empty() ? " some threads wait at" : ", others at") + place;
                current = &fibers[i];
            }
        }
    }
    fail("deadlock: %u of %u threads have ended,%s", block.ended, block.count, where.c_str());
}

void run_block() {
    block.ended = block.waiting = 0;
    block.ready = order_of(block.count);
    while (block.ended < block.count) {
        if (block.ready.empty()) {
            current = nullptr;
            report_deadlock();
        }
        const size_t chosen = choose(block.ready.size());
        const unsigned index = block.ready[chosen];
        block.ready.erase(block.ready.begin() + static_cast<ptrdiff_t>(chosen));
        current = &fibers[index];
        threadIdx = current->thread;
        switch_to(scheduler, current->context);
        switch (current->state) {
            case State::ended:
                ++block.ended;
                release_after_end(index);
                release_barrier();
                break;
            case State::at_barrier:
                ++block.waiting;
                release_barrier();
                break;
            case State::at_warp:
                release_warp(index);
                break;
            case State::ready:
                break;
        }
    }
    current = nullptr;
}

void start_block(const Grid & grid, unsigned index) {
    blockIdx = {index % grid.blocks.x, index / grid.blocks.x % grid.blocks.y,
                index / grid.blocks.x / grid.blocks.y};
    fill(static_cast<char *>(shared_data), static_cast<char *>(shared_data) + shared_size);
    for (const SharedVariable & v : shared_variables) {
        fill(static_cast<char *>(v.data), static_cast<char *>(v.data) + v.size);
    }
    for (unsigned i = 0; i < block.count; ++i) {
        Fiber & f = fibers[i];
        const dim3 & t = grid.threads;
        f.thread = {i % t.x, i / t.x % t.y, i / t.x / t.y};
        f.lane = static_cast<int>(i % WARP);
        f.state = State::ready;
        prepare(f.context, f.stack, fiber_main);
    }
}

void make_fibers(unsigned count) {
    while (fibers.size() < count) {
        Fiber f{};
        char * memory = static_cast<char *>(
            mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (memory == MAP_FAILED) {
            fail("no memory for the stacks of %u threads", count);
        }
        mprotect(memory, PAGE, PROT_NONE);
        f.stack = memory + PAGE;
        fibers.push_back(f);
    }
}

}  // namespace

void fail(const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    add_place();
    raise_error();
}

void assume(bool condition, const char * text, const char * file, int line) {
    if (!condition) {
        fail("%s:%d assumes what does not hold: %s", file, line, text);
    }
}

int lane() { return current->lane; }

int block_barrier(int value, const char * file, int line) {
    current->value = value != 0;
    wait(State::at_barrier, file, line);
    return static_cast<int>(current->result);
}

uint64_t warp_operation(
    WarpOp op, unsigned mask, uint64_t value, int source, const char * file, int line) {
    if (!(mask >> lane() & 1)) {
        fail("lane %d is not in its own mask 0x%08x", lane(), mask);
    }
    current->op = op;
    current->mask = mask;
    current->value = value;
    current->source = source;
    wait(State::at_warp, file, line);
    return current->result;
}

void together(void (*f)(void * const *), void * mine, const char * file, int line) {
    current->call = f;
    warp_operation(WarpOp::call, 0xFFFFFFFF, reinterpret_cast<uint64_t>(mine), 0, file, line);
}

void enter_kernel(const char * name, int64_t max_threads) {
    kernel_name = name;
    if (block.count > max_threads) {
        fail("launched with %u threads, __launch_bounds__ allows %lld", block.count,
             static_cast<long long>(max_threads));
    }
}

bool allow_shared(int bytes) {
    shared_limit = std::max(shared_limit, std::min(static_cast<size_t>(bytes), SHARED_MAX));
    return static_cast<size_t>(bytes) <= SHARED_MAX;
}

void * dynamic_shared() { return shared_data; }

void * static_shared(const char * name, const char * file, int line, size_t size) {
    for (const SharedVariable & v : shared_variables) {
        if (v.file == file && v.line == line) {
            return v.data;
        }
    }
    static_size += size;
    if (static_size + shared_size > shared_limit) {
        fail("%zu bytes of shared memory, the limit is %zu", static_size + shared_size, shared_limit);
    }
    void * data = allocate((std::string("shared ") + name).c_str(), size, Kind::shared);
    shared_variables.push_back({file, line, data, size});
    return data;
}

void run_grid(const Grid & grid, void (*thread)(void *), void * argument) {
    const uint64_t threads = uint64_t(grid.threads.x) * grid.threads.y * grid.threads.z;
    const uint64_t blocks = uint64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
    if (threads == 0 || threads > MAX_THREADS || grid.threads.z > 64 || blocks == 0 ||
        grid.blocks.x > INT_MAX || grid.blocks.y > 65535 || grid.blocks.z > 65535) {
        fail("invalid launch: grid (%u,%u,%u), block (%u,%u,%u)", grid.blocks.x, grid.blocks.y,
             grid.blocks.z, grid.threads.x, grid.threads.y, grid.threads.z);
    }
    if (grid.shared > shared_limit) {
        fail("invalid launch: %zu bytes of dynamic shared memory, the limit is %zu", grid.shared,
             shared_limit);
    }
    shared_size = grid.shared;
    shared_data = allocate("dynamic shared memory", grid.shared, Kind::shared);
    static_size = 0;
    shared_variables.clear();
    make_fibers(static_cast<unsigned>(threads));
    gridDim = grid.blocks;
    blockDim = grid.threads;
    block.thread = thread;
    block.argument = argument;
    block.count = static_cast<unsigned>(threads);
    for (unsigned index : order_of(static_cast<unsigned>(blocks))) {
        start_block(grid, index);
        run_block();
    }
}

void * allocate(const char * name, size_t size, Kind kind) {
    const size_t room = size + (kind == Kind::pool ? settings.slack : 0);
    const size_t pages = (room + 15 + PAGE - 1) / PAGE * PAGE;
    if (arena_used + pages + 2 * GAP > ARENA) {
        fail("`%s`: no addresses left for %zu bytes", name, size);
    }
    Allocation a{name, nullptr, size, arena + arena_used + GAP, nullptr, kind};
    a.end = a.begin + pages;
    arena_used += pages + GAP;
    if (mprotect(a.begin, pages, PROT_READ | PROT_WRITE) != 0) {
        fail("`%s`: no memory for %zu bytes", name, size);
    }
    fill(a.begin, a.end);
    // CUDA's own alignment is 256 bytes; 16 is what the widest access of a thread needs
    a.data = settings.schedule & 1 ? a.begin : a.end - (room + 15) / 16 * 16;
    allocations.push_back(a);
    return a.data;
}

void free_pool(void * data) {
    for (const Allocation & a : allocations) {
        if (a.data == data) {
            check_surroundings(a);
        }
    }
}

void make_read_only(const void * data) {
    for (const Allocation & a : allocations) {
        if (a.data == data) {
            mprotect(a.begin, a.end - a.begin, PROT_READ);
        }
    }
}

const char * guarded(const Settings & chosen, const std::function<void()> & work) {
    static char * alternate = static_cast<char *>(malloc(64 * 1024));
    if (arena == nullptr) {
        arena = static_cast<char *>(mmap(nullptr, ARENA, PROT_NONE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    settings = chosen;
    random_state = chosen.schedule;
    stack_t stack{}, old_stack{};
    stack.ss_sp = alternate;
    stack.ss_size = 64 * 1024;
    sigaltstack(&stack, &old_stack);
    struct sigaction action{}, old_segv{}, old_bus{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    sigjmp_buf jump;
    on_error = &jump;
    volatile bool failed = false;
    if (sigsetjmp(jump, 1) == 0) {
        work();
        for (const Allocation & a : allocations) {
            check_surroundings(a);
        }
    } else {
        failed = true;
    }
    on_error = nullptr;
    current = nullptr;
    release_all();
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
    return failed ? message : nullptr;
}

}  // namespace emu
