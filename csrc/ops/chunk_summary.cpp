#include "ops/chunk_summary.h"

#include "ops/schema.h"

namespace eva_attn {
namespace {

void run_forward(const Call&, const Tensors<5>&) {}
void run_backward(const Call&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                  const Tensors<5>&, const Tensors<11>&) {}

const std::string kOptions =
    "SymInt[2] grid_size, SymInt[2] chunk_size, SymInt[2] chunk_overlap=0, SymInt num_prefix_tokens=0, "
    "bool is_causal=False, " EVA_ATTN_WEIGHTS ", Tensor? noise=None, Tensor? key_padding_mask=None, "
    "float? scale=None, float norm_eps=1e-05, SymInt mean_divisor=0, bool tangent=False";

} // namespace

std::array<c10::SymInt, 3> entropy_shape(const Call& call) {
    return {call.query.sym_size(0), call.query.sym_size(1),
            call.summary.tangent ? call.geometry.num_chunks() : c10::SymInt(0)};
}

Tensors<5> prepare_chunk_summary(const Call& call) {
    check_inputs(call);
    check_summary(call);
    const Tensor& query = call.query;
    const auto dtype = query.scalar_type(), accumulation = accumulation_dtype(dtype);
    const c10::SymInt per_chunk[] = {query.sym_size(0), query.sym_size(1), call.geometry.num_chunks(),
                                     query.sym_size(3)};
    return {empty_beside(query, per_chunk, dtype), empty_beside(query, per_chunk, dtype),
            empty_beside(query, per_chunk, accumulation), empty_beside(query, per_chunk, accumulation),
            empty_beside(query, entropy_shape(call), accumulation)};
}

Tensors<11> prepare_chunk_summary_backward(const Call& call, const OptionalTensor& grad_landmark_key,
                                           const OptionalTensor& grad_landmark_value,
                                           const OptionalTensor& grad_landmark_entropy,
                                           const Tensors<5>& outputs) {
    check_inputs(call);
    check_summary(call);
    const Tensor& query = call.query;
    const auto dtype = query.scalar_type(), accumulation = accumulation_dtype(dtype);
    const c10::SymInt per_chunk[] = {query.sym_size(0), query.sym_size(1), call.geometry.num_chunks(),
                                     query.sym_size(3)};
    const auto check = [&](const char* name, const OptionalTensor& tensor, at::ScalarType expected) {
        if (tensor) check_matches(name, *tensor, per_chunk, expected, query.device());
    };
    const auto& [landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] = outputs;
    check("grad_landmark_key", grad_landmark_key, dtype);
    check("grad_landmark_value", grad_landmark_value, dtype);
    check("landmark_key", landmark_key, dtype);
    check("landmark_value", landmark_value, dtype);
    check("key_mean", key_mean, accumulation);
    check("query_mean", query_mean, accumulation);
    const auto per_entropy = entropy_shape(call);
    check_matches("landmark_entropy", landmark_entropy, per_entropy, accumulation, query.device());
    if (grad_landmark_entropy)
        check_matches("grad_landmark_entropy", *grad_landmark_entropy, per_entropy, accumulation,
                      query.device());
    return std::tuple_cat(std::make_tuple(empty_tokens(query), empty_tokens(query), empty_tokens(query)),
                          empty_weight_gradients(call));
}

TORCH_LIBRARY_FRAGMENT(eva_attn, m) {
    define(m, "chunk_summary(Tensor query, Tensor key, Tensor value, *, " + kOptions +
                  ") -> (Tensor landmark_key, Tensor landmark_value, Tensor key_mean, Tensor query_mean, "
                  "Tensor landmark_entropy)");
    define(m, "chunk_summary_backward(Tensor? grad_landmark_key, Tensor? grad_landmark_value, "
              "Tensor? grad_landmark_entropy, Tensor query, Tensor key, Tensor value, Tensor landmark_key, "
              "Tensor landmark_value, Tensor key_mean, Tensor query_mean, Tensor landmark_entropy, *, " +
                  kOptions + ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, " +
                  EVA_ATTN_WEIGHT_GRADIENTS ")");
}

TORCH_LIBRARY_IMPL(eva_attn, Meta, m) { ChunkSummaryBackend<run_forward, run_backward>::implement(m); }

} // namespace eva_attn
