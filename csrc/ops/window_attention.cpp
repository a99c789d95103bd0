#include "ops/window_attention.h"

#include "ops/schema.h"

namespace eva_attn {
namespace {

void run_forward(const Call&, const Tensors<2>&) {}
void run_backward(const Call&, const Tensor&, const Tensors<2>&, const Tensors<7>&) {}

const std::string kInputs =
    "Tensor query, Tensor key, Tensor value, Tensor? landmark_key=None, Tensor? landmark_value=None";
const std::string kBackwardInputs = "Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? "
                                    "landmark_key, Tensor? landmark_value, "
                                    "Tensor output, Tensor logsumexp";
const std::string kOptions =
    "SymInt[2] grid_size, SymInt[2] window_size, SymInt[2] chunk_size=1, SymInt[2] overlap=0, "
    "SymInt[2] chunk_overlap=0, SymInt num_prefix_tokens=0, bool is_causal=False, Tensor? "
    "relative_bias=None, "
    "Tensor? landmark_bias=None, Tensor? key_padding_mask=None, Tensor? dropout_seed=None, float "
    "dropout_p=0., "
    "bool exclude_window_landmarks=False, float? scale=None, Tensor? landmark_entropy=None";

} // namespace

Tensors<2> prepare_window_attention(const Call& call) {
    check_inputs(call);
    check_attention(call);
    const Tensor& query = call.query;
    const c10::SymInt per_token[] = {query.sym_size(0), query.sym_size(1), query.sym_size(2)};
    return {empty_tokens(query), empty_beside(query, per_token, accumulation_dtype(query.scalar_type()))};
}

Tensors<7> prepare_window_attention_backward(const Call& call, const Tensor& grad_output,
                                             const Tensors<2>& outputs) {
    check_inputs(call);
    check_attention(call);
    const Tensor& query = call.query;
    const auto dtype = query.scalar_type();
    const c10::SymInt per_token[] = {query.sym_size(0), query.sym_size(1), query.sym_size(2)};
    const auto& [output, logsumexp] = outputs;
    check_matches("grad_output", grad_output, query.sym_sizes(), dtype, query.device());
    check_matches("output", output, query.sym_sizes(), dtype, query.device());
    check_matches("logsumexp", logsumexp, per_token, accumulation_dtype(dtype), query.device());
    return {empty_tokens(query),
            empty_tokens(query),
            empty_tokens(query),
            empty_gradient(query, call.landmark_key),
            empty_gradient(query, call.landmark_value),
            empty_gradient(query, call.attention.relative_bias),
            empty_gradient(query, call.attention.landmark_entropy)};
}

TORCH_LIBRARY_FRAGMENT(eva_attn, m) {
    define(m, "window_attention(" + kInputs + ", *, " + kOptions + ") -> (Tensor output, Tensor logsumexp)");
    define(m, "window_attention_backward(" + kBackwardInputs + ", *, " + kOptions +
                  ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_landmark_key, "
                  "Tensor grad_landmark_value, Tensor grad_relative_bias, Tensor grad_landmark_entropy)");
}

TORCH_LIBRARY_IMPL(eva_attn, Meta, m) { WindowAttentionBackend<run_forward, run_backward>::implement(m); }

} // namespace eva_attn
