#include "ops/decode_step.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>

#include "ops/schema.h"

namespace eva_attn {
namespace {

void run(const DecodeCall&, const Tensor&) {}

// There is no gradient: a step changes what it would need.
void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const auto& arguments = op.schema().arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
        const c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
        if (!value.isTensor()) continue;
        const Tensor& tensor = value.toTensor();
        TORCH_CHECK_NOT_IMPLEMENTED(!(at::GradMode::is_enabled() && tensor.requires_grad()),
                                    op.operator_name(), " has no gradient, and ", arguments[i].name(),
                                    " requires one: call it under torch.no_grad()");
        if (arguments[i].alias_info()) tensor.unsafeGetTensorImpl()->bump_version();
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

void check_state(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape, at::ScalarType dtype,
                 at::Device device) {
    check_matches(name, tensor, shape, dtype, device);
    TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ",
                      tensor.sym_strides());
}

} // namespace

Tensor prepare_decode_step(const DecodeCall& decode) {
    const Call& call = decode.call;
    check_inputs(call);
    check_summary(call);
    check_attention(call);

    const auto& [window_key, window_value, landmark_key, landmark_value, key_sum, query_sum, head_position,
                 landmark_entropy] = decode.state;
    const SymGeometry& g = call.geometry;
    const Tensor& query = call.query;
    const auto batch = query.sym_size(0), heads = query.sym_size(1), head_dim = query.sym_size(3);
    const c10::SymInt window[] = {batch, heads, g.window_width + g.overlap_x, head_dim};
    const auto dtype = query.scalar_type(), accumulation = accumulation_dtype(dtype);
    const auto device = query.device();
    check_state("window_key", window_key, window, dtype, device);
    check_state("window_value", window_value, window, dtype, device);
    TORCH_CHECK_VALUE(landmark_key.dim() == 4,
                      "landmark_key must have shape [batch, heads, landmarks, head_dim], got ",
                      landmark_key.sym_sizes());
    const c10::SymInt landmarks[] = {batch, heads, landmark_key.sym_size(2), head_dim};
    check_state("landmark_key", landmark_key, landmarks, dtype, device);
    check_state("landmark_value", landmark_value, landmarks, dtype, device);
    check_state("key_sum", key_sum, {batch, heads, head_dim}, accumulation, device);
    check_state("query_sum", query_sum, {batch, heads, head_dim}, accumulation, device);
    check_state("head_position", head_position, {batch, heads}, at::kLong, device);
    if (landmark_entropy)
        check_state("landmark_entropy", *landmark_entropy, {batch, heads, landmark_key.sym_size(2)},
                    accumulation, device);
    TORCH_CHECK_VALUE(!landmark_entropy || !decode.log_count_bias,
                      "log_count_bias must be False with landmark_entropy, which stands in its place");
    if (decode.num_tokens) check_matches("num_tokens", *decode.num_tokens, {batch}, at::kLong, device);
    return empty_tokens(query);
}

TORCH_LIBRARY_FRAGMENT(eva_attn, m) {
    define(m, "decode_step(Tensor query, Tensor key, Tensor value, Tensor(a!) window_key, "
              "Tensor(b!) window_value, Tensor(c!) landmark_key, Tensor(d!) landmark_value, "
              "Tensor(e!) key_sum, Tensor(f!) query_sum, Tensor(g!) head_position, *, SymInt window_size, "
              "SymInt chunk_size, SymInt overlap=0, " EVA_ATTN_WEIGHTS
              ", Tensor? relative_bias=None, Tensor? num_tokens=None, bool exclude_window_landmarks=False, "
              "bool log_count_bias=False, float? scale=None, float norm_eps=1e-05, "
              "Tensor(h!)? landmark_entropy=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(eva_attn, Meta, m) { m.impl("decode_step", &DecodeStepBackend<run>::forward); }

TORCH_LIBRARY_IMPL(eva_attn, Autograd, m) {
    m.impl("decode_step", torch::CppFunction::makeFromBoxedFunction<&autograd>());
}

} // namespace eva_attn
