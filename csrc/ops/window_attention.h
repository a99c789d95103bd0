#pragma once

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/signature.h"

namespace eva_attn {

inline Call window_attention_call(c10::SymIntArrayRef grid_size, c10::SymIntArrayRef window_size,
                                  c10::SymIntArrayRef chunk_size, c10::SymIntArrayRef overlap,
                                  c10::SymIntArrayRef chunk_overlap, c10::SymInt num_prefix_tokens,
                                  bool is_causal, const OptionalTensor& relative_bias,
                                  const OptionalTensor& landmark_bias, const OptionalTensor& key_padding_mask,
                                  const OptionalTensor& dropout_seed, double dropout_p,
                                  bool exclude_window_landmarks, std::optional<double> scale,
                                  const OptionalTensor& landmark_entropy) {
    return Call{
        .geometry = make_geometry(grid_size, window_size, chunk_size, overlap, chunk_overlap,
                                  std::move(num_prefix_tokens), is_causal),
        .key_padding_mask = key_padding_mask,
        .scale = scale,
        .attention = {.relative_bias = relative_bias,
                      .landmark_bias = landmark_bias,
                      .dropout_seed = dropout_seed,
                      .dropout_p = dropout_p,
                      .exclude_window_landmarks = exclude_window_landmarks,
                      .landmark_entropy = landmark_entropy},
    };
}

// Outputs: output, logsumexp.
// Gradients: query, key, value, landmark_key, landmark_value, relative_bias, landmark_entropy.
struct WindowAttention {
    static constexpr const char* kName = "eva_attn::window_attention";
    static constexpr const char* kBackwardName = "eva_attn::window_attention_backward";
    using Inputs =
        Types<const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
    using Options = Parameters<&window_attention_call>;
    using GradOutputs = TensorReferences<1>;
    static constexpr size_t kNumOutputs = 2, kNumGradients = 7;
    static constexpr std::array<size_t, 1> kDifferentiable{0};
    static constexpr bool has_gradient(size_t tensor) { return tensor < 6 || tensor == 9; }
};

// Check everything and allocate what the op returns.
Tensors<2> prepare_window_attention(const Call& call);
Tensors<7> prepare_window_attention_backward(const Call& call, const Tensor& grad_output,
                                             const Tensors<2>& outputs);

// The ops of a backend from Forward(call, outputs) and Backward(call, grad_output, outputs, gradients).
template <auto Forward, auto Backward, class Options = WindowAttention::Options>
struct WindowAttentionBackend;

template <auto Forward, auto Backward, class... Options>
struct WindowAttentionBackend<Forward, Backward, Types<Options...>> {
    static Tensors<2> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                              const OptionalTensor& landmark_key, const OptionalTensor& landmark_value,
                              Options... options) {
        Call call = window_attention_call(options...);
        call.query = query, call.key = key, call.value = value;
        call.landmark_key = landmark_key, call.landmark_value = landmark_value;
        const auto outputs = prepare_window_attention(call);
        Forward(call, outputs);
        return outputs;
    }

    static Tensors<7> backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                               const Tensor& value, const OptionalTensor& landmark_key,
                               const OptionalTensor& landmark_value, const Tensor& output,
                               const Tensor& logsumexp, Options... options) {
        Call call = window_attention_call(options...);
        call.query = query, call.key = key, call.value = value;
        call.landmark_key = landmark_key, call.landmark_value = landmark_value;
        const Tensors<2> outputs{output, logsumexp};
        const auto gradients = prepare_window_attention_backward(call, grad_output, outputs);
        Backward(call, grad_output, outputs, gradients);
        return gradients;
    }

    static void implement(torch::Library& m) {
        m.impl("window_attention", &forward);
        m.impl("window_attention_backward", &backward);
    }
};

} // namespace eva_attn
