// The functions that the tests call through ctypes: each copies its inputs into device memory, runs
// one function of ggml's CUDA backend, and copies the results back. Each returns the error as text,
// or nullptr. Owns also what of ggml-cuda.cu the kernels' host code needs: one device, its memory
// pool, the end of a context, and plain loops in place of cuBLAS. Leaves out: the emulation (`emulation.cpp`), what is right
// (`../llama_cpp_patch/test_cuda_emulation.py`).

#include <cstdarg>
#include <memory>
#include <numeric>
#include <vector>

#include "common.cuh"
#include "getrows.cuh"
#include "mmf.cuh"
#include "mmid.cuh"
#include "mmq.cuh"
#include "mmvf.cuh"
#include "mmvq.cuh"
#include "quantize.cuh"

#include "emulation.h"
#include "ggml-backend-impl.h"

// ---- what ggml-cuda.cu owns ---------------------------------------------------------------------

const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info = [] {
        ggml_cuda_device_info i{};
        i.device_count = i.physical_device_count = 1;
        i.devices[0].cc = __CUDA_ARCH__;
        i.devices[0].nsm = 3;
        i.devices[0].smpb = 48 * 1024;
        i.devices[0].smpbo = __CUDA_ARCH__ >= 750 ? 99 * 1024 : 48 * 1024;
        i.devices[0].warp_size = 32;
        i.devices[0].physical_share_count = 1;
        return i;
    }();
    return info;
}

void ggml_cuda_set_device(int) {}

int ggml_cuda_get_device() { return 0; }

void ggml_cuda_error(const char * stmt, const char * func, const char * file, int line, const char * msg) {
    emu::fail("%s of %s (%s:%d): %s", stmt, func, file, line, msg);
}

// instead of ggml-base's, which ends the process: an assertion of ggml is a finding
void ggml_abort(const char * file, int line, const char * format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    emu::fail("%s:%d: %s", file, line, text);
}

namespace {

struct Pool : ggml_cuda_pool {
    void * alloc(size_t size, size_t * actual_size) override {
        *actual_size = size;
        return emu::allocate("memory of the pool", size, emu::Kind::pool);
    }
    void free(void * data, size_t) override { emu::free_pool(data); }
};

}  // namespace

std::unique_ptr<ggml_cuda_pool> ggml_backend_cuda_context::new_pool_for_device(int, int) {
    return std::make_unique<Pool>();
}

ggml_backend_cuda_context::~ggml_backend_cuda_context() {}

// mul_mat_f, for tensor cores and F16, BF16 or F32, is not compiled: as if no shape fitted it.
bool ggml_cuda_should_use_mmf(
    enum ggml_type, int, int, const int64_t *, const size_t *, const int, bool) {
    return false;
}

void ggml_cuda_mul_mat_f(ggml_backend_cuda_context &, const ggml_tensor *, const ggml_tensor *,
                         const ggml_tensor *, ggml_tensor *) {
    emu::fail("mul_mat_f is not emulated");
}

// one expert's matrix with the rows that were gathered for it, which cuBLAS multiplies
void ggml_cuda_mul_mat(ggml_backend_cuda_context &, const ggml_tensor * src0,
                       const ggml_tensor * src1, ggml_tensor * dst) {
    const auto row_of = [](const ggml_tensor * t, int64_t row) {
        const char * data = static_cast<const char *>(t->data) + row * t->nb[1];
        std::vector<float> values(t->ne[0]);
        for (int64_t i = 0; i < t->ne[0]; ++i) {
            switch (t->type) {
                case GGML_TYPE_F32:  values[i] = reinterpret_cast<const float *>(data)[i]; break;
                case GGML_TYPE_F16:  values[i] = reinterpret_cast<const half *>(data)[i]; break;
                case GGML_TYPE_BF16: values[i] = reinterpret_cast<const nv_bfloat16 *>(data)[i]; break;
                default: emu::fail("no product with type %s", ggml_type_name(t->type));
            }
        }
        return values;
    };
    std::vector<std::vector<float>> columns;
    for (int64_t column = 0; column < src1->ne[1]; ++column) {
        columns.push_back(row_of(src1, column));
    }
    for (int64_t row = 0; row < src0->ne[1]; ++row) {
        const std::vector<float> weights = row_of(src0, row);
        for (int64_t column = 0; column < src1->ne[1]; ++column) {
            const double sum = std::inner_product(
                weights.begin(), weights.end(), columns[column].begin(), 0.0);
            reinterpret_cast<float *>(static_cast<char *>(dst->data) + column * dst->nb[1])[row] =
                static_cast<float>(sum);
        }
    }
}

// op.cu
void emu_op_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool emu_should_fuse(const ggml_tensor * up, const ggml_tensor * gate, const ggml_tensor * glu);
bool emu_should_fuse_vec_f(const ggml_tensor * tensor);
bool emu_should_fuse_vec_q(const ggml_tensor * tensor);

// ---- device memory ------------------------------------------------------------------------------

namespace {

template <class T>
const T * input(const char * name, const T * host, size_t count, size_t zeros_after = 0) {
    if (host == nullptr) {
        return nullptr;
    }
    char * device = static_cast<char *>(
        emu::allocate(name, count * sizeof(T) + zeros_after, emu::Kind::buffer));
    memcpy(device, host, count * sizeof(T));
    memset(device + count * sizeof(T), 0, zeros_after);
    emu::make_read_only(device);
    return reinterpret_cast<const T *>(device);
}

template <class T>
struct Output {
    T * host;
    T * device;
    size_t count;
    Output(const char * name, T * host, size_t count)
        : host(host), device(static_cast<T *>(emu::allocate(name, count * sizeof(T),
                                                            emu::Kind::buffer))), count(count) {}
    void copy_back() const { memcpy(host, device, count * sizeof(T)); }
};

using Context = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

Context tensors() {
    return Context(ggml_init({16 * ggml_tensor_overhead(), nullptr, true}), ggml_free);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char * emu_mm_ids(const emu::Settings * settings, const int32_t * ids, int ids_count,
                        int32_t * ids_src1, int32_t * ids_dst, int32_t * bounds, int n_experts,
                        int n_tokens, int n_used, int nchannels_y, int si1, int sis1,
                        bool write_inverse) {
    return emu::guarded(*settings, [&] {
        const size_t slots = static_cast<size_t>(n_tokens) * n_used;
        const int32_t * ids_d = input("ids", ids, ids_count);
        const Output<int32_t> src1("ids_src1", ids_src1, slots), dst("ids_dst", ids_dst, slots),
            bound("expert_bounds", bounds, n_experts + 1);
        ggml_cuda_launch_mm_ids_helper(ids_d, src1.device, dst.device, bound.device, n_experts,
                                       n_tokens, n_used, nchannels_y, si1, sis1, write_inverse,
                                       nullptr);
        src1.copy_back();
        dst.copy_back();
        bound.copy_back();
    });
}

// x: `x_count` floats. `scatter`: ids say for each slot of a token which row it is (`rows` in all);
// else which row of x each of `rows` rows is. y: rows · cols/128 blocks of block_q8_1_mmq.
const char * emu_quantize_mmq(const emu::Settings * settings, int type, const float * x,
                              int64_t x_count, const int32_t * ids, int64_t ids_count, void * y,
                              int64_t cols, int64_t stride, int64_t padded_cols, int64_t rows,
                              bool scatter, int64_t n_tokens, int n_used) {
    return emu::guarded(*settings, [&] {
        const float * x_d = input("x", x, x_count);
        const int32_t * ids_d = input("ids", ids, ids_count);
        const Output<char> out("y", static_cast<char *>(y),
                               rows * padded_cols / QK8_1_MMQ * sizeof(block_q8_1_mmq));
        if (scatter) {
            quantize_scatter_mmq_q8_1_cuda(x_d, ids_d, out.device, ggml_type(type), cols, stride,
                                           padded_cols, n_tokens, rows, n_used, nullptr);
        } else {
            quantize_mmq_q8_1_cuda(x_d, ids_d, out.device, ggml_type(type), cols, stride, 0, 0,
                                   padded_cols, rows, 1, 1, nullptr);
        }
        out.copy_back();
    });
}

struct MulMatId {
    int kernel;     // 0: mul_mat_vec_q, 1: mul_mat_vec_f, 2: the op, which chooses
    int type;       // ggml_type of the matrices
    int cols, rows, n_experts, n_used, n_tokens;
    int slots_y;    // rows of src1 for each token: 1 or n_used
    int ids_stride; // in numbers
    int skip;       // whether the op is told that negative ids mean nothing to do
    int glu;        // ggml_glu_op
    float limit;
    const void * matrices;
    const void * gate;         // like `matrices`, or nullptr
    const float * bias;        // n_experts · rows, or nullptr
    const float * gate_bias;
    const float * y;           // n_tokens · slots_y · cols
    const int32_t * ids;       // (n_tokens - 1) · ids_stride + n_used
    float * result;            // n_tokens · n_used · rows
};

const char * emu_mul_mat_id(const emu::Settings * settings, const MulMatId * m) {
    return emu::guarded(*settings, [&] {
        const ggml_type type = ggml_type(m->type);
        const Context context = tensors();
        ggml_context * c = context.get();
        // ggml's CUDA buffers end in zeros up to a whole number of MATRIX_ROW_PADDING columns
        const int beyond = m->cols % MATRIX_ROW_PADDING;
        const size_t padding = ggml_is_quantized(type) && beyond
            ? ggml_row_size(type, MATRIX_ROW_PADDING - beyond) : 0;
        const auto matrices = [&](const char * name, const void * data) {
            ggml_tensor * t = ggml_new_tensor_3d(c, type, m->cols, m->rows, m->n_experts);
            t->data = const_cast<char *>(
                input(name, static_cast<const char *>(data), ggml_nbytes(t), padding));
            return t;
        };
        const auto numbers = [&](const char * name, const float * data, int ne0, int ne1, int ne2) {
            ggml_tensor * t = ggml_new_tensor_3d(c, GGML_TYPE_F32, ne0, ne1, ne2);
            t->data = const_cast<float *>(input(name, data, ggml_nelements(t)));
            return t;
        };
        ggml_tensor * src0 = matrices("src0", m->matrices);
        ggml_tensor * src1 = numbers("src1", m->y, m->cols, m->slots_y, m->n_tokens);
        ggml_tensor * ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, m->n_used, m->n_tokens);
        ids->nb[1] = m->ids_stride * sizeof(int32_t);
        ids->data = const_cast<int32_t *>(
            input("ids", m->ids, size_t(m->n_tokens - 1) * m->ids_stride + m->n_used));
        ggml_tensor * dst = ggml_mul_mat_id(c, src0, src1, ids);
        ggml_set_op_params_i32(dst, 4, m->skip);
        const Output<float> out("dst", m->result, ggml_nelements(dst));
        dst->data = out.device;
        ggml_backend_buffer buffer{};
        src0->buffer = src1->buffer = dst->buffer = ids->buffer = &buffer;

        ggml_cuda_mm_fusion_args_host fusion{};
        fusion.glu_op = ggml_glu_op(m->glu);
        fusion.glu_limit = m->limit;
        if (m->gate) {
            fusion.gate = matrices("gate", m->gate);
        }
        if (m->bias) {
            fusion.x_bias = numbers("bias", m->bias, m->rows, m->n_experts, 1);
        }
        if (m->gate_bias) {
            fusion.gate_bias = numbers("gate bias", m->gate_bias, m->rows, m->n_experts, 1);
        }
        const bool fused = m->gate || m->bias || m->gate_bias;
        ggml_backend_cuda_context cuda(0);
        switch (m->kernel) {
            case 0: ggml_cuda_mul_mat_vec_q(cuda, src0, src1, ids, dst, fused ? &fusion : nullptr); break;
            case 1: ggml_cuda_mul_mat_vec_f(cuda, src0, src1, ids, dst, fused ? &fusion : nullptr); break;
            default: emu_op_mul_mat_id(cuda, dst); break;
        }
        out.copy_back();
    });
}

// Whether the backend may fuse two products of one token with their GLU, and one with what follows:
// by mul_mat_vec_f, by mul_mat_vec_q.
const char * emu_fuses(const emu::Settings * settings, int type, bool skip_up, bool skip_gate,
                       int32_t * answers) {
    return emu::guarded(*settings, [&] {
        const Context context = tensors();
        ggml_context * c = context.get();
        ggml_backend_buffer buffer{};
        ggml_tensor * y = ggml_new_tensor_3d(c, GGML_TYPE_F32, 512, 1, 1);
        ggml_tensor * ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, 4, 1);
        const auto product = [&](bool skip) {
            ggml_tensor * experts = ggml_new_tensor_3d(c, ggml_type(type), 512, 12, 8);
            experts->buffer = &buffer;
            ggml_tensor * t = ggml_mul_mat_id(c, experts, y, ids);
            ggml_set_op_params_i32(t, 4, skip);
            return t;
        };
        const ggml_tensor * up = product(skip_up), * gate = product(skip_gate);
        const ggml_tensor * glu = ggml_swiglu_split(
            c, const_cast<ggml_tensor *>(gate), const_cast<ggml_tensor *>(up));
        answers[0] = emu_should_fuse(up, gate, glu);
        answers[1] = emu_should_fuse_vec_f(up);
        answers[2] = emu_should_fuse_vec_q(up);
    });
}

}  // extern "C"
#pragma GCC visibility pop
