#include "ops/eva_attention.h"

#include "cuda/chunk_summary.h"
#include "cuda/window_attention.h"

namespace eva_attn::cuda {
namespace {

// Both tensors are contiguous.
SummaryResults results_in(const Call& call, const Tensor& landmarks, const Tensor& statistics) {
    const auto part = [](const Tensor& tensor, int64_t begin) {
        return static_cast<char*>(tensor.data_ptr()) + begin * tensor.element_size();
    };
    const bool has_means = keeps_means(call);
    const int64_t size = landmarks.stride(0);
    return {.landmark_key = part(landmarks, 0),
            .landmark_value = part(landmarks, size),
            .key_mean = has_means ? part(statistics, 0) : nullptr,
            .query_mean = has_means ? part(statistics, size) : part(landmarks, 2 * size),
            .omega = keeps_omega(call) ? part(statistics, 2 * size) : nullptr,
            .landmark_entropy = call.summary.tangent ? part(statistics, 2 * size) : nullptr};
}

void forward(const Call& call, const Tensors<4>& outputs) {
    const auto& [output, logsumexp, landmarks, statistics] = outputs;
    const SummaryResults results = results_in(call, landmarks, statistics);
    const Geometry geometry = concrete(call.geometry);
    run(EvaAttention::kName, call, [&](cudaStream_t stream) {
        Summary(call, geometry, results).forward(stream);
        Attention(call, geometry, geometry.num_chunks(), results, output, logsumexp, stream).forward();
    });
}

void backward(const Call& call, const Tensor& grad_output, const Tensors<4>& outputs,
              const Tensors<12>& gradients) {
    const auto& [output, logsumexp, saved_landmarks, saved_statistics] = outputs;
    const Tensor landmarks = saved_landmarks.contiguous(), statistics = saved_statistics.contiguous();
    const SummaryResults results = results_in(call, landmarks, statistics);
    const auto& [grad_query, grad_key, grad_value, w0, w1, w2, w3, w4, w5, w6, w7, grad_relative_bias] =
        gradients;
    const Geometry geometry = concrete(call.geometry);
    run(EvaAttention::kBackwardName, call, [&](cudaStream_t stream) {
        Attention attention(call, geometry, geometry.num_chunks(), results, output, logsumexp, stream);
        Room room(grad_query);
        attention.backward_global(grad_output, room);
        Summary summary(call, geometry, results);
        summary.backward(attention.grad_global_key(), attention.grad_global_value(),
                         attention.grad_landmark_entropy(), {w0, w1, w2, w3, w4, w5, w6, w7}, stream, room);
        attention.backward_tokens(summary.chunk_terms(attention.on_tensor_cores()), grad_query, grad_key,
                                  grad_value, grad_relative_bias);
    });
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CUDA, m) { EvaAttentionBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cuda
