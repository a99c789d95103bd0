#include "ops/eva_attention.h"

#include <ATen/ops/as_strided.h>

#include "kernels/tensors.h"
#include "ops/schema.h"

namespace eva_attn {
namespace {

void check_all(const Call& call) {
    check_inputs(call);
    check_summary(call);
    check_attention(call);
}

void run_forward(const Call&, const Tensors<4>&) {}
void run_backward(const Call&, const Tensor&, const Tensors<4>&, const Tensors<12>&) {}

struct SavedShapes {
    std::array<c10::SymInt, 3> logsumexp;
    std::array<c10::SymInt, 5> landmarks;
    std::array<c10::SymInt, 1> statistics;
};
SavedShapes saved_shapes(const Call& call) {
    const Tensor& query = call.query;
    const c10::SymInt batch = query.sym_size(0), heads = query.sym_size(1), head_dim = query.sym_size(3);
    const c10::SymInt num_chunks = call.geometry.num_chunks(), rows = batch * heads * num_chunks;
    c10::SymInt statistics = 0;
    if (keeps_means(call)) statistics += (keeps_omega(call) ? 3 : 2) * rows * head_dim;
    if (call.summary.tangent) statistics += rows;
    return {.logsumexp = {batch, heads, query.sym_size(2)},
            .landmarks = {keeps_means(call) ? 2 : 3, batch, heads, num_chunks, head_dim},
            .statistics = {statistics}};
}

const std::string kOptions =
    "SymInt[2] grid_size, SymInt[2] window_size, SymInt[2] chunk_size, SymInt[2] overlap=0, "
    "SymInt[2] chunk_overlap=0, SymInt num_prefix_tokens=0, bool is_causal=False, " EVA_ATTN_WEIGHTS
    ", Tensor? noise=None, Tensor? relative_bias=None, Tensor? landmark_bias=None, "
    "Tensor? key_padding_mask=None, Tensor? dropout_seed=None, float dropout_p=0., "
    "bool exclude_window_landmarks=False, float? scale=None, float norm_eps=1e-05, SymInt mean_divisor=0, "
    "bool tangent=False";
const std::string kForwardResults = "(Tensor output, Tensor logsumexp, Tensor landmarks, Tensor statistics)";
const std::string kSaved = "Tensor output, Tensor logsumexp, Tensor landmarks, Tensor statistics";
const std::string kParameterGradients = EVA_ATTN_WEIGHT_GRADIENTS ", Tensor grad_relative_bias)";

// In the backward pass through the summaries.
bool may_use_tensor_cores(const Call& call) {
    const SymGeometry& g = call.geometry;
    const auto dtype = call.query.scalar_type();
    const bool is_half = dtype == at::kBFloat16 || dtype == at::kHalf;
    return is_half && !call.summary.tangent && g.chunk_overlap_y == 0 && g.chunk_overlap_x == 0 &&
           call.query.sym_size(3) % 8 == 0;
}

} // namespace

bool keeps_means(const Call& call) {
    const SymGeometry& g = call.geometry;
    return !may_use_tensor_cores(call) || g.chunk_height * g.chunk_width > kFewMembers ||
           call.query.sym_size(3) > kFewMembersHeadDim;
}

bool keeps_omega(const Call& call) { return may_use_tensor_cores(call) && keeps_means(call); }

Tensors<4> prepare_eva_attention(const Call& call) {
    check_all(call);
    const Tensor& query = call.query;
    const auto accumulation = accumulation_dtype(query.scalar_type());
    const SavedShapes shapes = saved_shapes(call);
    return {empty_tokens(query), empty_beside(query, shapes.logsumexp, accumulation),
            empty_beside(query, shapes.landmarks, query.scalar_type()),
            empty_beside(query, shapes.statistics, accumulation)};
}

Tensors<12> prepare_eva_attention_backward(const Call& call, const Tensor& grad_output,
                                           const Tensors<4>& outputs, const OptionalTensor& grad_qkv) {
    check_all(call);
    const Tensor& query = call.query;
    const auto dtype = query.scalar_type(), accumulation = accumulation_dtype(dtype);
    const SavedShapes shapes = saved_shapes(call);
    const auto& [output, logsumexp, landmarks, statistics] = outputs;
    check_matches("grad_output", grad_output, query.sym_sizes(), dtype, query.device());
    check_matches("output", output, query.sym_sizes(), dtype, query.device());
    check_matches("logsumexp", logsumexp, shapes.logsumexp, accumulation, query.device());
    check_matches("landmarks", landmarks, shapes.landmarks, dtype, query.device());
    check_matches("statistics", statistics, shapes.statistics, accumulation, query.device());

    const auto grad_tokens = [&](int64_t i) { return grad_qkv ? unpack(*grad_qkv, i) : empty_tokens(query); };
    return std::tuple_cat(std::make_tuple(grad_tokens(0), grad_tokens(1), grad_tokens(2)),
                          empty_weight_gradients(call),
                          std::make_tuple(empty_gradient(query, call.attention.relative_bias)));
}

Tensor unpack(const Tensor& qkv, int64_t i) { // one view instead of a select's and a transpose's
    const auto sizes = qkv.sym_sizes(), strides = qkv.sym_strides();
    return at::as_strided_symint(qkv, {sizes[0], sizes[3], sizes[1], sizes[4]},
                                 {strides[0], strides[3], strides[1], strides[4]},
                                 qkv.sym_storage_offset() + strides[2] * i);
}

void set_qkv(Call& call, const Tensor& qkv) {
    check_qkv(qkv);
    call.query = unpack(qkv, 0), call.key = unpack(qkv, 1), call.value = unpack(qkv, 2);
}

TORCH_LIBRARY_FRAGMENT(eva_attn, m) {
    define(m,
           "eva_attention(Tensor query, Tensor key, Tensor value, " + kOptions + ") -> " + kForwardResults);
    define(m, "eva_attention_qkvpacked(Tensor qkv, " + kOptions + ") -> " + kForwardResults);
    define(m, "eva_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, " + kSaved +
                  ", *, " + kOptions + ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, " +
                  kParameterGradients);
    define(m, "eva_attention_qkvpacked_backward(Tensor grad_output, Tensor qkv, " + kSaved + ", *, " +
                  kOptions + ") -> (Tensor grad_qkv, " + kParameterGradients);
}

TORCH_LIBRARY_IMPL(eva_attn, Meta, m) { EvaAttentionBackend<run_forward, run_backward>::implement(m); }

} // namespace eva_attn
