#include "ops/eva_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <algorithm>

#include "cpu/chunk_summary.h"
#include "cpu/window_attention.h"

namespace eva_attn::cpu {
namespace {

// The results of a summary [B, H, C, D] and [B, H, C], in the memory that the op returns.
struct Results {
    Results(const Call& call, const Tensor& landmarks, const Tensor& statistics)
        : landmark_key(landmarks.select(0, 0)), landmark_value(landmarks.select(0, 1)) {
        const int64_t count = landmark_key.numel();
        const Tensor both = landmarks.narrow(0, 0, 2);
        const auto sizes = both.sizes();
        const Tensor means = keeps_means(call) ? statistics.narrow(0, 0, 2 * count).view(sizes)
                                               : at::empty(sizes, statistics.options());
        key_mean = means.select(0, 0);
        query_mean = means.select(0, 1);
        if (keeps_omega(call)) omega = statistics.slice(0, 2 * count);
        if (call.summary.tangent) landmark_entropy = statistics.slice(0, 2 * count).view(sizes.slice(1, 3));
    }

    Tensor landmark_key, landmark_value, key_mean, query_mean;
    OptionalTensor omega, landmark_entropy;
};

void forward(const Call& call, const Tensors<4>& outputs) {
    const auto& [output, logsumexp, landmarks, statistics] = outputs;
    const auto [landmark_key, landmark_value, key_mean, query_mean, omega, entropy] =
        Results(call, landmarks, statistics);
    const Geometry geometry = concrete(call.geometry);
    Summary summary(call, geometry, key_mean, query_mean, entropy);
    const Attention attention(call, geometry, landmark_key, landmark_value, entropy, output, logsumexp);
    std::vector<Stage> stages{summary.forward(landmark_key, landmark_value, omega)};
    attention.forward(stages);
    run(stages, call.query.size(0) * call.query.size(1), attention.blocks(), Direction::kForward);
    if (!keeps_means(call)) landmarks.select(0, 2).copy_(query_mean);
}

void backward(const Call& call, const Tensor& grad_output, const Tensors<4>& outputs,
              const Tensors<12>& gradients) {
    const auto& [output, logsumexp, landmarks, statistics] = outputs;
    const auto [landmark_key, landmark_value, key_mean, query_mean, omega, entropy] =
        Results(call, landmarks.contiguous(), statistics.contiguous());
    const auto& [grad_query, grad_key, grad_value, w0, w1, w2, w3, w4, w5, w6, w7, grad_relative_bias] =
        gradients;
    const Geometry geometry = concrete(call.geometry);
    Attention attention(call, geometry, landmark_key, landmark_value, entropy, output, logsumexp);
    Summary summary(call, geometry, key_mean, query_mean, entropy);
    std::vector<Stage> stages;
    const Tensor unused = keeps_means(call) ? Tensor() : at::empty_like(landmarks); // what means come with
    if (unused.defined()) stages.push_back(summary.forward(unused.select(0, 0), unused.select(0, 1)));
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
