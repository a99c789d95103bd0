#include "ops/chunk_summary.h"

#include "ops/autocast.h"
#include "ops/autograd.h"
#include "ops/schema.h"

namespace eva_attn {
namespace {

void run_forward(const Call&, const Tensors<4>&) {}
void run_backward(const Call&, const OptionalTensor&, const OptionalTensor&, const Tensors<4>&,
                  const Tensors<11>&) {}

const std::string kOptions =
    "SymInt[2] grid_size, SymInt[2] chunk_size, SymInt[2] chunk_overlap=0, SymInt num_prefix_tokens=0, "
    "bool is_causal=False, " EVA_ATTN_WEIGHTS ", Tensor? noise=None, Tensor? key_padding_mask=None, "
    "float? scale=None, float norm_eps=1e-05, SymInt mean_divisor=0";

} // namespace

Tensors<4> prepare_chunk_summary(const Call& call) {
    check_inputs(call);
    check_summary(call);
    const Tensor& query = call.query;
    const auto dtype = query.scalar_type(), accumulation = accumulation_dtype(dtype);
    const c10::SymInt per_chunk[] = {query.sym_size(0), query.sym_size(1), call.geometry.num_chunks(),
                                     query.sym_size(3)};
    return {empty_beside(query, per_chunk, dtype), empty_beside(query, per_chunk, dtype),
            empty_beside(query, per_chunk, accumulation), empty_beside(query, per_chunk, accumulation)};
}

Tensors<11> prepare_chunk_summary_backward(const Call& call, const OptionalTensor& grad_landmark_key,
                                           const OptionalTensor& grad_landmark_value,
                                           const Tensors<4>& outputs) {
    check_inputs(call);
    check_summary(call);
    const Tensor& query = call.query;
    const auto dtype = query.scalar_type(), accumulation = accumulation_dtype(dtype);
    const c10::SymInt per_chunk[] = {query.sym_size(0), query.sym_size(1), call.geometry.num_chunks(),
                                     query.sym_size(3)};
    const auto check = [&](const char* name, const OptionalTensor& tensor, at::ScalarType expected) {
        if (tensor) check_matches(name, *tensor, per_chunk, expected, query.device());
    };
    const auto& [landmark_key, landmark_value, key_mean, query_mean] = outputs;
    check("grad_landmark_key", grad_landmark_key, dtype);
    check("grad_landmark_value", grad_landmark_value, dtype);
    check("landmark_key", landmark_key, dtype);
    check("landmark_value", landmark_value, dtype);
    check("key_mean", key_mean, accumulation);
    check("query_mean", query_mean, accumulation);
    return std::tuple_cat(std::make_tuple(empty_tokens(query), empty_tokens(query), empty_tokens(query)),
                          empty_weight_gradients(call));
}

TORCH_LIBRARY_FRAGMENT(eva_attn, m) {
    define(m, "chunk_summary(Tensor query, Tensor key, Tensor value, *, " + kOptions +
                  ") -> (Tensor landmark_key, Tensor landmark_value, Tensor key_mean, Tensor query_mean)");
    define(m, "chunk_summary_backward(Tensor? grad_landmark_key, Tensor? grad_landmark_value, Tensor query, "
              "Tensor key, Tensor value, Tensor landmark_key, Tensor landmark_value, Tensor key_mean, "
              "Tensor query_mean, *, " +
                  kOptions + ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, " +
                  EVA_ATTN_WEIGHT_GRADIENTS ")");
}

TORCH_LIBRARY_IMPL(eva_attn, Meta, m) { ChunkSummaryBackend<run_forward, run_backward>::implement(m); }

TORCH_LIBRARY_IMPL(eva_attn, Autograd, m) {
    m.impl("chunk_summary", &AutogradForward<ChunkSummary>::call);
    m.impl("chunk_summary_backward", &AutogradBackward<ChunkSummary>::call);
}

TORCH_LIBRARY_IMPL(eva_attn, AutocastCPU, m) {
    m.impl("chunk_summary", &Autocast<ChunkSummary, at::kCPU>::forward);
}

TORCH_LIBRARY_IMPL(eva_attn, AutocastCUDA, m) {
    m.impl("chunk_summary", &Autocast<ChunkSummary, at::kCUDA>::forward);
}

} // namespace eva_attn
