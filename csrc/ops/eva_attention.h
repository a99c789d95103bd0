#pragma once

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/signature.h"

namespace eva_attn {

inline Call eva_attention_call(c10::SymIntArrayRef grid_size, c10::SymIntArrayRef window_size,
                               c10::SymIntArrayRef chunk_size, c10::SymIntArrayRef overlap,
                               c10::SymIntArrayRef chunk_overlap, c10::SymInt num_prefix_tokens,
                               bool is_causal, const OptionalTensor& key_weight,
                               const OptionalTensor& key_bias, const OptionalTensor& key_norm_weight,
                               const OptionalTensor& key_norm_bias, const OptionalTensor& query_weight,
                               const OptionalTensor& query_bias, const OptionalTensor& query_norm_weight,
                               const OptionalTensor& query_norm_bias, const OptionalTensor& noise,
                               const OptionalTensor& relative_bias, const OptionalTensor& landmark_bias,
                               const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
                               double dropout_p, bool exclude_window_landmarks, std::optional<double> scale,
                               double norm_eps, c10::SymInt mean_divisor, bool tangent) {
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
        .attention = {.relative_bias = relative_bias,
                      .landmark_bias = landmark_bias,
                      .dropout_seed = dropout_seed,
                      .dropout_p = dropout_p,
                      .exclude_window_landmarks = exclude_window_landmarks},
    };
}

// Outputs: output, logsumexp, and of the summaries, in two tensors as allocations take time, `landmarks`
// [2, B, H, C, D], keys first, and `statistics`, flat: the means of keys and of queries [B, H, C, D], omega
// [B, H, C, D] where it `keeps_omega`, and entropies [B, H, C], of tangents. Unless it `keeps_means`, a third
// of `landmarks` are the means of queries.
// Gradients: query, key, value (or qkv), the eight weights, relative_bias.
struct EvaAttention {
    static constexpr const char* kName = "eva_attn::eva_attention";
    static constexpr const char* kBackwardName = "eva_attn::eva_attention_backward";
    using Inputs = TensorReferences<3>;
    using Options = Parameters<&eva_attention_call>;
    using GradOutputs = TensorReferences<1>;
    static constexpr size_t kNumOutputs = 4, kNumGradients = 12;
    static constexpr std::array<size_t, 1> kDifferentiable{0};
    static constexpr bool has_gradient(size_t tensor) { return tensor < 11 || tensor == 12; }
};

struct EvaAttentionQkvpacked {
    static constexpr const char* kName = "eva_attn::eva_attention_qkvpacked";
    static constexpr const char* kBackwardName = "eva_attn::eva_attention_qkvpacked_backward";
    using Inputs = TensorReferences<1>;
    using Options = EvaAttention::Options;
    using GradOutputs = EvaAttention::GradOutputs;
    static constexpr size_t kNumOutputs = 4, kNumGradients = 10;
    static constexpr std::array<size_t, 1> kDifferentiable{0};
    static constexpr bool has_gradient(size_t tensor) { return tensor < 9 || tensor == 10; }
};

// Whether the backward pass gets the chunks' means in the accumulation type. Those of few 16-bit members
// would take as much memory as the members.
bool keeps_means(const Call& call);
// Whether it gets omega beside them, which tensor cores ask for.
bool keeps_omega(const Call& call);

// Check everything and allocate what the op returns.
Tensors<4> prepare_eva_attention(const Call& call);
// grad_query, grad_key and grad_value, if given, are views to be written.
Tensors<12> prepare_eva_attention_backward(const Call& call, const Tensor& grad_output,
                                           const Tensors<4>& outputs,
                                           const OptionalTensor& grad_qkv = std::nullopt);
// Element i of a packed projection [B, N, 3, H, D] as [B, H, N, D].
Tensor unpack(const Tensor& qkv, int64_t i);
void set_qkv(Call& call, const Tensor& qkv);

// The ops of a backend from Forward(call, outputs) and Backward(call, grad_output, outputs, gradients).
template <auto Forward, auto Backward, class Options = EvaAttention::Options>
struct EvaAttentionBackend;

template <auto Forward, auto Backward, class... Options>
struct EvaAttentionBackend<Forward, Backward, Types<Options...>> {
    static Tensors<4> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                              Options... options) {
        Call call = eva_attention_call(options...);
        call.query = query, call.key = key, call.value = value;
        return run(call);
    }

    static Tensors<4> forward_packed(const Tensor& qkv, Options... options) {
        Call call = eva_attention_call(options...);
        set_qkv(call, qkv);
        return run(call);
    }

    static Tensors<12> backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                const Tensor& value, const Tensor& output, const Tensor& logsumexp,
                                const Tensor& landmarks, const Tensor& statistics, Options... options) {
        Call call = eva_attention_call(options...);
        call.query = query, call.key = key, call.value = value;
        const Tensors<4> outputs{output, logsumexp, landmarks, statistics};
        auto gradients = prepare_eva_attention_backward(call, grad_output, outputs);
        Backward(call, grad_output, outputs, gradients);
        return gradients;
    }

    static Tensors<10> backward_packed(const Tensor& grad_output, const Tensor& qkv, const Tensor& output,
                                       const Tensor& logsumexp, const Tensor& landmarks,
                                       const Tensor& statistics, Options... options) {
        Call call = eva_attention_call(options...);
        set_qkv(call, qkv);
        const Tensors<4> outputs{output, logsumexp, landmarks, statistics};
        const Tensor grad_qkv = empty_beside(qkv, qkv.sym_sizes(), qkv.scalar_type());
        const auto gradients = prepare_eva_attention_backward(call, grad_output, outputs, grad_qkv);
        Backward(call, grad_output, outputs, gradients);
        return std::apply([&](const Tensor&, const Tensor&, const Tensor&,
                              const auto&... rest) { return Tensors<10>(grad_qkv, rest...); },
                          gradients);
    }

    static void implement(torch::Library& m) {
        m.impl("eva_attention", &forward);
        m.impl("eva_attention_backward", &backward);
        m.impl("eva_attention_qkvpacked", &forward_packed);
        m.impl("eva_attention_qkvpacked_backward", &backward_packed);
    }

  private:
    static Tensors<4> run(const Call& call) {
        const auto outputs = prepare_eva_attention(call);
        Forward(call, outputs);
        return outputs;
    }
};

} // namespace eva_attn
