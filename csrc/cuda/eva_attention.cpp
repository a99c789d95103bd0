#include "ops/eva_attention.h"

#include "cuda/chunk_summary.h"
#include "cuda/window_attention.h"

namespace eva_attn::cuda {
namespace {

void forward(const Call& call, const Tensors<7>& outputs) {
    const auto& [output, logsumexp, landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] =
        outputs;
    const OptionalTensor entropy = entropy_of(call, landmark_entropy);
    const Geometry geometry = concrete(call.geometry);
    run(EvaAttention::kName, call, [&](cudaStream_t stream) {
        Summary(call, geometry, key_mean, query_mean, landmark_entropy)
            .forward(landmark_key, landmark_value, stream);
        Attention(call, geometry, landmark_key, landmark_value, entropy, output, logsumexp, stream).forward();
    });
}

void backward(const Call& call, const Tensor& grad_output, const Tensors<7>& outputs,
              const Tensors<12>& gradients) {
    const auto& [output, logsumexp, landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] =
        outputs;
    const OptionalTensor entropy = entropy_of(call, landmark_entropy);
    const auto& [grad_query, grad_key, grad_value, w0, w1, w2, w3, w4, w5, w6, w7, grad_relative_bias] =
        gradients;
    const Geometry geometry = concrete(call.geometry);
    run(EvaAttention::kBackwardName, call, [&](cudaStream_t stream) {
        Attention attention(call, geometry, landmark_key, landmark_value, entropy, output, logsumexp, stream);
        attention.backward_global(grad_output, /*room=*/grad_query);
        Summary summary(call, geometry, key_mean, query_mean, landmark_entropy);
        summary.backward(attention.grad_global_key(), attention.grad_global_value(),
                         attention.grad_landmark_entropy(), {w0, w1, w2, w3, w4, w5, w6, w7}, stream);
        attention.backward_tokens(summary.chunk_terms(attention.on_tensor_cores()), grad_query, grad_key,
                                  grad_value, grad_relative_bias);
    });
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CUDA, m) { EvaAttentionBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cuda
