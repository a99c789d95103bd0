#include "ops/eva_attention.h"

#include <algorithm>

#include "cpu/chunk_summary.h"
#include "cpu/window_attention.h"

namespace eva_attn::cpu {
namespace {

void forward(const Call& call, const Tensors<7>& outputs) {
    const auto& [output, logsumexp, landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] =
        outputs;
    prefer_huge_pages(output);
    const Geometry geometry = concrete(call.geometry);
    Summary summary(call, geometry, key_mean, query_mean, landmark_entropy);
    const OptionalTensor entropy = entropy_of(call, landmark_entropy);
    const Attention attention(call, geometry, landmark_key, landmark_value, entropy, output, logsumexp);
    std::vector<Stage> stages{summary.forward(landmark_key, landmark_value)};
    attention.forward(stages);
    run(stages, call.query.size(0) * call.query.size(1), attention.blocks(), Direction::kForward);
}

void backward(const Call& call, const Tensor& grad_output, const Tensors<7>& outputs,
              const Tensors<12>& gradients) {
    const auto& [output, logsumexp, landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] =
        outputs;
    const auto& [grad_query, grad_key, grad_value, w0, w1, w2, w3, w4, w5, w6, w7, grad_relative_bias] =
        gradients;
    for (const Tensor& gradient : {grad_query, grad_key, grad_value}) prefer_huge_pages(gradient);
    const Geometry geometry = concrete(call.geometry);
    const OptionalTensor entropy = entropy_of(call, landmark_entropy);
    Attention attention(call, geometry, landmark_key, landmark_value, entropy, output, logsumexp);
    Summary summary(call, geometry, key_mean, query_mean, landmark_entropy);
    std::vector<Stage> stages;
    const int64_t heads = call.query.size(0) * call.query.size(1), at_once = heads_at_once(heads);
    attention.backward(stages, grad_output, grad_query, grad_key, grad_value, at_once);
    stages.push_back(summary.backward(attention.grad_global_key(), attention.grad_global_value(),
                                      attention.grad_landmark_entropy(), attention.blocks_per_piece()));
    stages.push_back(summary.add_to_tokens(grad_query, grad_key, grad_value));
    for (int64_t first = 0; first < heads; first += at_once) {
        const int64_t count = std::min(at_once, heads - first);
        attention.start_at(first);
        summary.start_at(first);
        run(stages, count, attention.blocks(), Direction::kBackward);
        summary.add_to_weights(count);
    }
    summary.weight_gradients({w0, w1, w2, w3, w4, w5, w6, w7});
    attention.relative_bias_gradient(grad_relative_bias);
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CPU, m) { EvaAttentionBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cpu
