#pragma once

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/signature.h"

namespace eva_attn {

// What causal attention keeps of its sequences, all contiguous; changed in place.
struct DecodingState {
    Tensor window_key, window_value; // [B, H, window + overlap, D]; token i in slot i % (window + overlap)
    Tensor landmark_key, landmark_value; // [B, H, C, D]
    Tensor key_sum, query_sum;           // accumulation dtype [B, H, D], of the open chunk
    Tensor head_position;                // int64 [B, H], tokens taken in: each head counts for itself
    OptionalTensor landmark_entropy;     // accumulation dtype [B, H, C], iff landmarks are tangents
};

struct DecodeCall {
    Call call; // its geometry is that of the new tokens
    DecodingState state;
    OptionalTensor num_tokens; // int64 [B]
    bool log_count_bias;
};

inline DecodeCall
decode_step_call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& window_key,
                 const Tensor& window_value, const Tensor& landmark_key, const Tensor& landmark_value,
                 const Tensor& key_sum, const Tensor& query_sum, const Tensor& head_position,
                 c10::SymInt window_size, c10::SymInt chunk_size, c10::SymInt overlap,
                 const OptionalTensor& key_weight, const OptionalTensor& key_bias,
                 const OptionalTensor& key_norm_weight, const OptionalTensor& key_norm_bias,
                 const OptionalTensor& query_weight, const OptionalTensor& query_bias,
                 const OptionalTensor& query_norm_weight, const OptionalTensor& query_norm_bias,
                 const OptionalTensor& relative_bias, const OptionalTensor& num_tokens,
                 bool exclude_window_landmarks, bool log_count_bias, std::optional<double> scale,
                 double norm_eps, const OptionalTensor& landmark_entropy) {
    const c10::SymInt length = query.dim() == 4 ? query.sym_size(2) : 0; // another shape is refused later
    const c10::SymInt grid_size[] = {1, length}, window[] = {1, window_size}, chunk[] = {1, chunk_size},
                      window_overlap[] = {0, overlap}, chunk_overlap[] = {0, 0};
    return DecodeCall{
        .call = {.geometry = make_geometry(grid_size, window, chunk, window_overlap, chunk_overlap,
                                           /*num_prefix_tokens=*/0, /*is_causal=*/true),
                 .scale = scale,
                 .summary = {.key = {key_weight, key_bias, key_norm_weight, key_norm_bias},
                             .query = {query_weight, query_bias, query_norm_weight, query_norm_bias},
                             .noise = std::nullopt,
                             .norm_eps = norm_eps,
                             .tangent = landmark_entropy.has_value()},
                 .attention = {.relative_bias = relative_bias,
                               .landmark_bias = std::nullopt,
                               .dropout_seed = std::nullopt,
                               .exclude_window_landmarks = exclude_window_landmarks},
                 .query = query,
                 .key = key,
                 .value = value},
        .state = {window_key, window_value, landmark_key, landmark_value, key_sum, query_sum, head_position,
                  landmark_entropy},
        .num_tokens = num_tokens,
        .log_count_bias = log_count_bias,
    };
}

// Checks everything and allocates the output.
Tensor prepare_decode_step(const DecodeCall& decode);

// The op of a backend from Run(call, output).
template <auto Run, class Arguments = Parameters<&decode_step_call>>
struct DecodeStepBackend;

template <auto Run, class... Arguments>
struct DecodeStepBackend<Run, Types<Arguments...>> {
    static Tensor forward(Arguments... arguments) {
        const DecodeCall decode = decode_step_call(arguments...);
        const Tensor output = prepare_decode_step(decode);
        Run(decode, output);
        return output;
    }
};

} // namespace eva_attn
