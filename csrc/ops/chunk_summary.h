#pragma once

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/signature.h"

namespace eva_attn {

inline Call chunk_summary_call(c10::SymIntArrayRef grid_size, c10::SymIntArrayRef chunk_size,
                               c10::SymIntArrayRef chunk_overlap, c10::SymInt num_prefix_tokens,
                               bool is_causal, const OptionalTensor& key_weight,
                               const OptionalTensor& key_bias, const OptionalTensor& key_norm_weight,
                               const OptionalTensor& key_norm_bias, const OptionalTensor& query_weight,
                               const OptionalTensor& query_bias, const OptionalTensor& query_norm_weight,
                               const OptionalTensor& query_norm_bias, const OptionalTensor& noise,
                               const OptionalTensor& key_padding_mask, std::optional<double> scale,
                               double norm_eps, c10::SymInt mean_divisor, bool tangent) {
    const c10::SymInt window_size[] = {1, 1}, overlap[] = {0, 0}; // no part of this op
    return Call{
        .geometry = make_geometry(grid_size, window_size, chunk_size, overlap, chunk_overlap,
                                  std::move(num_prefix_tokens), is_causal),
        .key_padding_mask = key_padding_mask,
        .scale = scale,
        .summary = {.key = {key_weight, key_bias, key_norm_weight, key_norm_bias},
                    .query = {query_weight, query_bias, query_norm_weight, query_norm_bias},
                    .noise = noise,
                    .norm_eps = norm_eps,
                    .mean_divisor = std::move(mean_divisor),
                    .tangent = tangent},
    };
}

// Outputs: landmark_key, landmark_value, key_mean, query_mean, landmark_entropy.
// Gradients: query, key, value, the eight weights.
struct ChunkSummary {
    static constexpr const char* kName = "eva_attn::chunk_summary";
    static constexpr const char* kBackwardName = "eva_attn::chunk_summary_backward";
    using Inputs = TensorReferences<3>;
    using Options = Parameters<&chunk_summary_call>;
    using GradOutputs = Types<const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>;
    static constexpr size_t kNumOutputs = 5, kNumGradients = 11;
    static constexpr std::array<size_t, 3> kDifferentiable{0, 1, 4};
    static constexpr bool has_gradient(size_t tensor) { return tensor < 11; }
};

// [B, H, C], of tangents; of others [B, H, 0].
std::array<c10::SymInt, 3> entropy_shape(const Call& call);

// Check everything and allocate what the op returns.
Tensors<5> prepare_chunk_summary(const Call& call);
Tensors<11> prepare_chunk_summary_backward(const Call& call, const OptionalTensor& grad_landmark_key,
                                           const OptionalTensor& grad_landmark_value,
                                           const OptionalTensor& grad_landmark_entropy,
                                           const Tensors<5>& outputs);

// The ops of a backend from Forward(call, outputs) and
// Backward(call, grad_landmark_key, grad_landmark_value, grad_landmark_entropy, outputs, gradients).
template <auto Forward, auto Backward, class Options = ChunkSummary::Options>
struct ChunkSummaryBackend;

template <auto Forward, auto Backward, class... Options>
struct ChunkSummaryBackend<Forward, Backward, Types<Options...>> {
    static Tensors<5> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                              Options... options) {
        Call call = chunk_summary_call(options...);
        call.query = query, call.key = key, call.value = value;
        const auto outputs = prepare_chunk_summary(call);
        Forward(call, outputs);
        return outputs;
    }

    static Tensors<11> backward(const OptionalTensor& grad_landmark_key,
                                const OptionalTensor& grad_landmark_value,
                                const OptionalTensor& grad_landmark_entropy, const Tensor& query,
                                const Tensor& key, const Tensor& value, const Tensor& landmark_key,
                                const Tensor& landmark_value, const Tensor& key_mean,
                                const Tensor& query_mean, const Tensor& landmark_entropy,
                                Options... options) {
        Call call = chunk_summary_call(options...);
        call.query = query, call.key = key, call.value = value;
        const Tensors<5> outputs{landmark_key, landmark_value, key_mean, query_mean, landmark_entropy};
        const auto gradients = prepare_chunk_summary_backward(call, grad_landmark_key, grad_landmark_value,
                                                              grad_landmark_entropy, outputs);
        Backward(call, grad_landmark_key, grad_landmark_value, grad_landmark_entropy, outputs, gradients);
        return gradients;
    }

    static void implement(torch::Library& m) {
        m.impl("chunk_summary", &forward);
        m.impl("chunk_summary_backward", &backward);
    }
};

} // namespace eva_attn
