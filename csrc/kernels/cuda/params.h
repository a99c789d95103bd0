// What the CUDA kernels are told. Strides are in elements. S is the tensors' dtype, T the accumulation type
// (double for double, else float). Nothing is padded: rows are D long.
#pragma once

#include <cstdint>

#include "kernels/philox.h"
#include "kernels/tensors.h"

namespace eva_attn::cuda {

constexpr int kMaxHeadDim = 256;

// A = Linear(D, D), then LayerNorm(D). norm_weight null: no LayerNorm.
struct Projection {
    DType dtype;             // of all four
    const void* weight;      // [D out, D in], contiguous
    const void* bias;        // [D] or null
    const void* norm_weight; // [D] or null
    const void* norm_bias;   // [D] or null
};

// The state of each (batch, head) and the tokens that it takes in; the state is contiguous.
struct DecodeParams {
    int64_t batch, heads, tokens, head_dim;
    int64_t window_size, overlap, chunk_size, num_landmarks;
    Rows query, key, value;    // in
    const int64_t* num_tokens; // [B]: how many of the tokens are taken in; null: all
    void* window_key;          // S [B, H, window_size + overlap, D], token i in slot i % that size
    void* window_value;        // S [B, H, window_size + overlap, D]
    void* landmark_key;        // S [B, H, num_landmarks, D]
    void* landmark_value;      // S [B, H, num_landmarks, D]
    void* key_sum;             // T [B, H, D], of the open chunk
    void* query_sum;           // T [B, H, D]
    int64_t* position;         // [B, H]
    Projection key_projection, query_projection;
    bool has_projection;       // false: identity
    bool has_query_projection; // false beside has_projection: "key-only", mu = 0
    double norm_eps, scale;
    DType relative_bias_dtype;
    const void* relative_bias; // [H or 1, 2 (window_size + overlap) - 1] or null
    int64_t relative_bias_head_stride;
    double landmark_bias;   // added to the logits of landmarks
    void* landmark_entropy; // T [B, H, num_landmarks], likewise, of tangents; else null
    bool exclude_window_landmarks;
    Rows output; // out
};

struct SummaryParams {
    Shape shape;
    Rows query, key, value;       // in
    const bool* key_padding_mask; // [B, N] or null
    const void* noise;            // T [B, H, C, D] or null
    Projection key_projection, query_projection;
    bool has_projection;       // false: identity
    bool has_query_projection; // false beside has_projection: "key-only", mu = 0
    bool tangent; // landmarks are tangents at the mean queries: key_mean is 0, mu_scale 1, no projections
    double scale, mu_scale, norm_eps;
    int64_t mean_divisor; // 0: the number of valid tokens
    // forward: out; backward: in
    void* landmark_key = nullptr;     // S [B, H, C, D]
    void* landmark_value = nullptr;   // S [B, H, C, D]
    void* key_mean = nullptr;         // T [B, H, C, D]
    void* query_mean = nullptr;       // T [B, H, C, D], unused where mu = 0
    bool rounded_mean = false;        // of mma for few members: query_mean is in S, and there is no key_mean
    void* omega_rows = nullptr;       // T [B, H, C, D] or null; backward: of mma, of more than few members
    void* landmark_entropy = nullptr; // T [B, H, C], of tangents, forward only
    // backward, in: landmark gradients as `pieces` summands, added in order
    void* grad_landmark_key = nullptr;           // T [B H, pieces, global columns, D], landmarks first
    void* grad_landmark_value = nullptr;         // T [B H, pieces, global columns, D]
    const void* grad_landmark_entropy = nullptr; // T [B H, pieces, C], of tangents
    int64_t pieces = 0, global_columns = 0;
    bool rounded_gradients = false; // of mma for one piece: those of landmarks are in S
    // backward, out: what each member token needs of its chunk, of mma in S, else in T
    void* omega = nullptr;           // [B H C, D]
    void* grad_beta = nullptr;       // [B H C, D]
    void* grad_key_mean = nullptr;   // [B H C, D], divided by the mean's divisor; of tangents: that of k~
    void* grad_query_mean = nullptr; // [B H C, D], likewise
    void* grad_entropy = nullptr;    // T [B H C], of tangents, else null
    // [B H C, 2], double for float: log-sum-exp of the chunk's logits, sum_j p_j (grad_beta . v_j), of
    // tangents sum_j p_j (grad_beta . v_j + grad_k~ . k_j - grad_entropy * logit_j)
    void* chunk_stats = nullptr;
    // ... and where there is no chunk overlap, so that each token is in one chunk, else null:
    void* token_weight = nullptr; // T [B, H, N]: p_j
    void* token_grad = nullptr;   // T [B, H, N]: scale * p_j * (grad_beta . v_j - sum), the logit's gradient
    // backward, out: summands of the projections' gradients, the key's and the query's. Row by row the
    // Linear's weight and bias, the LayerNorm's weight and bias. Unused without a projection.
    void* grad_projections = nullptr; // T [projection_pieces, 2, D + 3, D]
    int64_t projection_pieces = 0;
    // backward, scratch of simt, for the key's and the query's projection: gradient of the Linear's output,
    // the LayerNorm's normalised input, gradient of A's output
    void* projection_rows = nullptr; // T [2, 3, B H C, D]
    // ... and of mma, of more than few members: the gradient of mu's two terms
    void* grad_mu = nullptr; // float [B H C, D]
};

// The gradients of the projections' parameters from their summands.
struct ProjectionGradients {
    struct Parameter {
        void* data; // null: not wanted
        DType dtype;
    };
    const void* terms;                                          // T [pieces, 2, D + 3, D]
    int64_t pieces, projections, head_dim;                      // of so many projections there are terms
    Parameter weight[2], bias[2], norm_weight[2], norm_bias[2]; // of the key's and the query's projection
};

// What window_attention_bwd left of the relative bias's gradient, and where the sum over pieces goes.
struct BiasGradient {
    const void* terms; // T [heads, pieces, entries]
    int64_t heads, pieces, entries;
    void* data; // [heads, entries]
    DType dtype;
};

// What the joint attention's backward adds for each token as a member of its chunks; omega null: nothing.
struct ChunkTerms {
    bool rounded; // the four rows of each chunk are in S, else in T
    const void* omega;
    const void* grad_beta;
    const void* grad_key_mean;
    const void* grad_query_mean;
    const void* grad_entropy; // not null: of tangents
    const void* chunk_stats;
    const void* token_weight;
    const void* token_grad;
};

struct TermsParams {
    Shape shape;
    Rows key, value;              // in
    const bool* key_padding_mask; // [B, N] or null
    double scale;
    ChunkTerms chunk_terms;
    Rows grad_query, grad_key, grad_value; // out
};

struct AttentionParams {
    Shape shape;
    Rows query, key, value;       // in
    int64_t num_landmarks;        // 0: window only
    const void* landmark_key;     // S [B, H, C, D]
    const void* landmark_value;   // S [B, H, C, D]
    const void* landmark_bias;    // T [B, C] or null
    const void* landmark_entropy; // T [B, H, C] or null: added to the landmarks' logits as well
    const int32_t* extents; // [B or 1, C, 4]: box (y0, y1, x0, x1) of each chunk's valid members, or null:
                            // none is empty and none is excluded
    int64_t extents_batch_stride;
    DType relative_bias_dtype; // float's or that of S
    const void* relative_bias; // [H or 1, bias_height, bias_width] or null
    int64_t relative_bias_head_stride;
    const bool* key_padding_mask; // [B, N] or null
    bool exclude_window_landmarks;
    Dropout dropout;             // its seed is read on the device:
    const int64_t* dropout_seed; // [1], on the device; null without dropout
    double scale;
    Rows output;     // forward: out; backward: in
    void* logsumexp; // T [B, H, N], natural logarithm, +inf for an empty row; forward: out; backward: in
    // backward
    Rows grad_output{};                          // in
    Rows grad_query{}, grad_key{}, grad_value{}; // out
    void* delta = nullptr; // T [B, H, N]: grad_output . output; out of the first kernel, in of the rest
    int64_t pieces = 0;    // summands of the gradients of the global columns
    bool rounded_gradients = false;        // of mma for one piece without prefix: these are in S
    void* grad_global_key = nullptr;       // T [B H, pieces, C + P, D], of landmarks and prefix keys
    void* grad_global_value = nullptr;     // T [B H, pieces, C + P, D]
    void* grad_landmark_entropy = nullptr; // T [B H, pieces, C] or null
    int64_t bias_pieces = 0;               // summands of the bias gradient for each (batch, head)
    void* grad_relative_bias = nullptr;    // T [H, B, bias_pieces, bias_height * bias_width] or null
    ChunkTerms chunk_terms{};
    int64_t prefix_pieces = 0;         // summands of the gradients of the prefix's queries
    void* grad_prefix_query = nullptr; // T [B H, prefix_pieces, P, D], of keys outside of the prefix
};

} // namespace eva_attn::cuda
