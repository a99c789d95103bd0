#include "ops/eva_attention.h"

#include <ATen/ops/zeros.h>

#include "cpu/chunk_summary.h"
#include "cpu/window_attention.h"

namespace eva_attn::cpu {
namespace {

void forward(const Call& call, const Tensors<6>& outputs) {
    const auto& [output, logsumexp, landmark_key, landmark_value, key_mean, query_mean] = outputs;
    const Geometry geometry = concrete(call.geometry);
    Summary(call, geometry, key_mean, query_mean).forward(landmark_key, landmark_value);
    Attention(call, geometry, landmark_key, landmark_value, output, logsumexp).forward();
}

void backward(const Call& call, const Tensor& grad_output, const Tensors<6>& outputs,
              const Tensors<12>& gradients) {
    const auto& [output, logsumexp, landmark_key, landmark_value, key_mean, query_mean] = outputs;
    const auto& [grad_query, grad_key, grad_value, w0, w1, w2, w3, w4, w5, w6, w7, grad_relative_bias] =
        gradients;
    const Geometry geometry = concrete(call.geometry);
    Attention attention(call, geometry, landmark_key, landmark_value, output, logsumexp);
    attention.backward_global(grad_output);

    Tensor grad_landmark_key = attention.grad_global_key(),
           grad_landmark_value = attention.grad_global_value();
    if (!grad_landmark_key.defined()) { // no tokens at all
        const int64_t sizes[] = {call.query.size(0) * call.query.size(1), 1, 0, padded(call.query.size(3))};
        grad_landmark_key = grad_landmark_value = at::zeros(sizes, key_mean.options());
    }
    Summary summary(call, geometry, key_mean, query_mean);
    summary.backward(grad_landmark_key, grad_landmark_value, {w0, w1, w2, w3, w4, w5, w6, w7});
    attention.backward_tokens(summary.chunk_terms(), grad_query, grad_key, grad_value, grad_relative_bias);
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CPU, m) { EvaAttentionBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cpu
