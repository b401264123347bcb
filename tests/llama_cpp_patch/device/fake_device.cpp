// A ggml backend for tests: "GPUs" with memory of their own, computing with the CPU's plain kernels.
//
// Owns: memory that only this backend can reach, the ops that it takes, and a log of what it did.
// Leaves out: speed (one op at a time, no threads to speak of), asynchronous work, host buffers.
//
// Memory: an address in a device buffer lies in pages without access; the bytes are `stride` further
// on. Whoever takes device memory for host memory crashes, and the device ends the process when it
// is asked to compute on anything outside its buffers. Fresh bytes are 0xff: NaN in every type of
// weight, -1 as an id. A copy of weights that the scheduler made is 0xff again once it was used.
//
// Environment:
//   FAKE_DEVICE_KNOWS_SKIP=0  a backend that never heard of ggml_mul_mat_id_set_skip(): it takes the
//                             op as any other and runs it without the flag, so a negative id aborts
//   FAKE_DEVICE_LOG=FILE      appends one JSON line for each MUL_MAT_ID
//   FAKE_DEVICE_MEMORY=N      bytes that the device says it has; nobody holds it to that
//   FAKE_DEVICE_COUNT=N       Fake0 and, if N is 2, Fake1; otherwise there is one

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

static const size_t MOST_DEVICES = 2;

static bool knows_skip() {
    const char * value = getenv("FAKE_DEVICE_KNOWS_SKIP");
    return !value || strcmp(value, "0") != 0;
}

static size_t device_count() {
    const char * value = getenv("FAKE_DEVICE_COUNT");
    return value && strcmp(value, "2") == 0 ? MOST_DEVICES : 1;
}

static ggml_backend_dev_t         fake_device(size_t index);
static ggml_backend_buffer_type_t fake_buft(ggml_backend_dev_t dev);

static const char * device_name(ggml_backend_dev_t dev) {
    return (const char *) dev->context;
}

// memory

struct memory {
    char * base;   // what tensors point into: no access
    size_t stride; // from there to the bytes
};

static ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src->buffer : t->buffer;
}

// where the bytes of a tensor in device memory are
static char * bytes(const ggml_tensor * t) {
    return (char *) t->data + ((memory *) buffer_of(t)->context)->stride;
}

// experts' bytes that came into a copy of weights since it was last used: address -> offset, size
static std::map<const void *, std::vector<std::pair<size_t, size_t>>> written;

// the scheduler names the copies of a split's inputs "backend#tensor#copy"
static bool is_copy(const ggml_tensor * t) {
    return strncmp(t->name, "Fake", 4) == 0 && strchr(t->name, '#') == t->name + 5;
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    auto * mem = (memory *) buffer->context;
    munmap(mem->base, 2*mem->stride);
    delete mem;
}

static void * buffer_base(ggml_backend_buffer_t buffer) {
    return ((memory *) buffer->context)->base;
}

static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset(bytes(t) + offset, value, size);
}

static void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset + size <= ggml_nbytes(t));
    memcpy(bytes(t) + offset, data, size);
    if (is_copy(t)) {
        written[t->data].emplace_back(offset, size);
    }
}

static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset + size <= ggml_nbytes(t));
    memcpy(data, bytes(t) + offset, size);
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    auto * mem = (memory *) buffer->context;
    memset(mem->base + mem->stride, value, buffer->size);
}

static const char * buft_name(ggml_backend_buffer_type_t buft) { return device_name(buft->device); }
static size_t buft_alignment(ggml_backend_buffer_type_t) { return 128; }
static bool buft_is_host(ggml_backend_buffer_type_t) { return false; }

static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    static const ggml_backend_buffer_i iface = [] {
        ggml_backend_buffer_i i = {};
        i.free_buffer   = buffer_free;
        i.get_base      = buffer_base;
        i.memset_tensor = buffer_memset;
        i.set_tensor    = buffer_set;
        i.get_tensor    = buffer_get;
        i.clear         = buffer_clear;
        return i;
    }();
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t stride = (size + page)/page*page; // at least one byte more than asked for
    void * base = mmap(nullptr, 2*stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    GGML_ASSERT(base != MAP_FAILED);
    GGML_ASSERT(mprotect(base, stride, PROT_NONE) == 0);
    memset((char *) base + stride, 0xff, stride);
    return ggml_backend_buffer_init(buft, iface, new memory { (char *) base, stride }, size);
}

static ggml_backend_buffer_type_t fake_buft(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type bufts[MOST_DEVICES];
    ggml_backend_buffer_type_t buft = &bufts[dev == fake_device(0) ? 0 : 1];
    *buft = { { buft_name, buft_alloc, buft_alignment, nullptr, nullptr, buft_is_host }, dev, nullptr };
    return buft;
}

// computing

struct fake_backend {
    ggml_backend_t cpu;
    std::vector<char> arena;
};

// as the CPU backend is to see it
static ggml_tensor on_host(ggml_backend_dev_t dev, const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = buffer_of(t);
    if (!buffer || buffer->buft != fake_buft(dev)) {
        GGML_ABORT("%s: '%s' is not in this device's memory but in %s", device_name(dev), t->name,
            buffer ? ggml_backend_buffer_name(buffer) : "none");
    }
    ggml_tensor copy = *t;
    copy.data     = bytes(t);
    copy.buffer   = nullptr;
    copy.view_src = nullptr;
    memset(copy.src, 0, sizeof(copy.src));
    return copy;
}

static std::string as_list(const std::set<int> & values) {
    std::string text;
    for (const int value : values) {
        text += (text.empty() ? "" : ", ") + std::to_string(value);
    }
    return "[" + text + "]";
}

// a line for a MUL_MAT_ID that is about to run
static void log_experts(ggml_backend_dev_t dev, const ggml_tensor * op) {
    const char * path = getenv("FAKE_DEVICE_LOG");
    if (!path) {
        return;
    }
    const ggml_tensor * weight = op->src[0];
    const ggml_tensor * ids    = op->src[2];
    std::set<int> used;
    int n_skipped = 0;
    for (int64_t i1 = 0; i1 < ids->ne[1]; ++i1) {
        for (int64_t i0 = 0; i0 < ids->ne[0]; ++i0) {
            const int32_t id = *(const int32_t *) (bytes(ids) + i1*ids->nb[1] + i0*ids->nb[0]);
            if (id >= 0) {
                used.insert(id);
            }
            n_skipped += id < 0;
        }
    }
    std::set<int> here; // experts of a copy that came whole
    for (const auto & [offset, size] : is_copy(weight) ? written[weight->data] : std::vector<std::pair<size_t, size_t>>()) {
        for (int e = 0; e < weight->ne[2]; ++e) {
            if (offset <= e*weight->nb[2] && (e + 1)*weight->nb[2] <= offset + size) {
                here.insert(e);
            }
        }
    }
    FILE * file = fopen(path, "a");
    GGML_ASSERT(file);
    fprintf(file, "{\"device\": \"%s\", \"weight\": \"%s\", \"copy\": %s, \"tokens\": %d, \"skips\": %s, "
        "\"skipped\": %d, \"used\": %s, \"copied\": %s}\n",
        device_name(dev), weight->name, is_copy(weight) ? "true" : "false", (int) ids->ne[1],
        ggml_mul_mat_id_skips(op) ? "true" : "false", n_skipped, as_list(used).c_str(), as_list(here).c_str());
    fclose(file);
}

static ggml_status compute_node(ggml_backend_t backend, const ggml_tensor * node) {
    auto * self = (fake_backend *) backend->context;
    ggml_init_params params = { self->arena.size(), self->arena.data(), /*.no_alloc =*/ true };
    ggml_context * ctx = ggml_init(params);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 16, false);

    ggml_tensor op = on_host(backend->device, node);
    ggml_tensor srcs[GGML_MAX_SRC];
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (node->src[i]) {
            srcs[i] = on_host(backend->device, node->src[i]);
            op.src[i] = &srcs[i];
        }
    }
    if (node->op == GGML_OP_MUL_MAT_ID) {
        log_experts(backend->device, node);
        if (!knows_skip()) {
            ggml_set_op_params_i32(&op, 4, 0); // nobody reads it here
        }
    }
    ggml_graph_add_node(graph, &op);
    const ggml_status status = ggml_backend_graph_compute(self->cpu, graph);
    if (node->op == GGML_OP_MUL_MAT_ID && is_copy(node->src[0])) {
        memset(bytes(node->src[0]), 0xff, ggml_nbytes(node->src[0]));
        written.erase(node->src[0]->data);
    }
    ggml_free(ctx);
    return status;
}

static ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (ggml_op_is_empty(node->op) || ggml_is_empty(node)) {
            continue;
        }
        const ggml_status status = compute_node(backend, node);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

static const char * backend_name(ggml_backend_t backend) { return device_name(backend->device); }

static void backend_free(ggml_backend_t backend) {
    auto * self = (fake_backend *) backend->context;
    ggml_backend_free(self->cpu);
    delete self;
    delete backend;
}

static void backend_set_n_threads(ggml_backend_t backend, int n_threads) {
    ggml_backend_t cpu = ((fake_backend *) backend->context)->cpu;
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
    ((ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))(cpu, n_threads);
}

static ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 'f', 'a', 'k', 'e', ' ', 'd', 'e', 'v', 'i', 'c', 'e', ' ', ' ', ' ', ' ', '0' };
    ggml_backend_i iface = {};
    iface.get_name      = backend_name;
    iface.free          = backend_free;
    iface.graph_compute = backend_compute;
    auto * self = new fake_backend;
    self->cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    self->arena.resize(ggml_graph_overhead_custom(16, false) + 1024);
    return new ggml_backend { &guid, iface, dev, self };
}

// device

static const char * device_description(ggml_backend_dev_t) { return "a device for tests"; }
static enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }
static ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t dev) { return fake_buft(dev); }

static void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    const char * value = getenv("FAKE_DEVICE_MEMORY");
    *free = *total = value ? strtoull(value, nullptr, 10) : (size_t) 8 << 30;
}

static void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = device_name(dev);
    props->description = device_description(dev);
    props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->caps.mmap_support = true;
}

// all that the CPU's plain kernels take; nothing here looks at the flag of a MUL_MAT_ID
static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return cpu->iface.supports_op(cpu, op);
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft == fake_buft(dev);
}

// as the CUDA backend: large batches, though the weights have to be copied for them
static bool device_offload_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT_ID && op->ne[2] >= 32;
}

// registry

static const char * reg_name(ggml_backend_reg_t) { return "Fake"; }
static size_t reg_device_count(ggml_backend_reg_t) { return device_count(); }
static ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t index) { return fake_device(index); }

static void * reg_proc_address(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return (void *) backend_set_n_threads;
    }
    if (strcmp(name, "ggml_mul_mat_id_set_skip") == 0 && knows_skip()) {
        return (void *) ggml_mul_mat_id_set_skip;
    }
    return nullptr;
}

static ggml_backend_reg_t fake_reg() {
    static ggml_backend_reg reg = {
        GGML_BACKEND_API_VERSION, { reg_name, reg_device_count, reg_device, reg_proc_address }, nullptr,
    };
    return &reg;
}

static ggml_backend_dev_t fake_device(size_t index) {
    static char names[MOST_DEVICES][6] = { "Fake0", "Fake1" };
    static ggml_backend_device devices[MOST_DEVICES];
    static const bool once = [] {
        for (size_t i = 0; i < MOST_DEVICES; ++i) {
            ggml_backend_device_i & iface = devices[i].iface;
            iface.get_name        = device_name;
            iface.get_description = device_description;
            iface.get_memory      = device_memory;
            iface.get_type        = device_type;
            iface.get_props       = device_props;
            iface.init_backend    = device_init;
            iface.get_buffer_type = device_buft;
            iface.supports_op     = device_supports_op;
            iface.supports_buft   = device_supports_buft;
            iface.offload_op      = device_offload_op;
            devices[i].reg     = fake_reg();
            devices[i].context = names[i];
        }
        return true;
    }();
    GGML_ASSERT(once && index < device_count());
    return &devices[index];
}

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    return fake_reg();
}
