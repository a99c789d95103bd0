// What the CPU kernels are told. Strides are in elements; T is the accumulation type (double for double,
// else float) and rows of T named "padded" are padded(D) long, zeros behind D.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/philox.h"
#include "kernels/tensors.h"

namespace eva_attn::cpu {

constexpr int64_t kLineElements = 16;

constexpr int64_t padded(int64_t n) { return (n + kLineElements - 1) / kLineElements * kLineElements; }

// A = Linear(D, D), then LayerNorm(D). All null: the identity. norm_weight null: no LayerNorm.
struct Projection {
    const void* weight;      // T [D out, padded D in]
    const void* weight_t;    // T [D in, padded D out]
    const void* bias;        // T [padded D] or null
    const void* norm_weight; // T [padded D] or null
    const void* norm_bias;   // T [padded D] or null
};

struct SummaryParams {
    Shape shape;
    int64_t first_head;           // task 0 is of this one of all B H
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
    void* landmark_key;     // S [B, H, C, D], forward only
    void* landmark_value;   // S [B, H, C, D], forward only
    void* key_mean;         // T [B, H, C, D]
    void* query_mean;       // T [B, H, C, D], unused where mu = 0
    void* omega_rows;       // T [B, H, C, D], forward only, or null
    void* landmark_entropy; // T [B, H, C], of tangents, forward only
    // backward works on `heads` of all B H at once, from first_head on
    // in: landmark gradients as `pieces` summands of stride `piece_stride`
    const void* grad_landmark_key;     // T [heads, pieces, C, padded D]
    const void* grad_landmark_value;   // T [heads, pieces, C, padded D]
    const void* grad_landmark_entropy; // T [heads, pieces, C], of tangents
    int64_t pieces, piece_stride, head_piece_stride;
    int64_t blocks_per_piece; // pieces before that of a chunk's own block have nothing for it
    // out: what each member token needs of its chunk
    void* omega;           // T [heads C, padded D]
    void* grad_beta;       // T [heads C, padded D]
    void* grad_key_mean;   // T [heads C, padded D], divided by the mean's divisor; of tangents: that of k~
    void* grad_query_mean; // T [heads C, padded D], likewise
    void* member_terms;    // T [heads C, tokens of a chunk, 2]: p_j and the gradient of omega.k_j
    // out: for the projections' gradients
    void* grad_key_linear;   // T [heads C, padded D]: gradient of the Linear's output
    void* grad_query_linear; // T [heads C, padded D]
    void* grad_vectors;      // T [tasks, 6, padded D]: key bias, norm weight, norm bias; the query's
};

// Tokens of the largest chunk.
inline int64_t chunk_size(const Geometry& g) {
    return detail::min(g.chunk_height + 2 * g.chunk_overlap_y, g.grid_height) *
           detail::min(g.chunk_width + 2 * g.chunk_overlap_x, g.grid_width);
}

// Causal attention goes through its sequences in blocks of whole windows: a block's summaries and attention
// follow one another while its tokens are in cache, and all heads, whose rows share pages, pass through it
// before the next one. All else is one block.
struct Blocks {
    int64_t count, windows, chunks, tokens; // but for the first number: of one block

    explicit Blocks(const Geometry& g)
        : count(1), windows(g.num_windows()), chunks(g.num_chunks()), tokens(g.grid_height * g.grid_width) {
        if (!g.is_causal || g.window_width % g.chunk_width != 0) return;
        constexpr int64_t kTokens = 128; // of two heads, in backward, a fraction of L2
        const int64_t positions = tokens;
        windows = detail::max(kTokens / g.window_width, 1);
        tokens = windows * g.window_width;
        chunks = tokens / g.chunk_width;
        count = detail::max(detail::ceil_div(positions, tokens), 1);
    }
};

// Most chunks of one task of the summaries.
constexpr int64_t kChunksPerTask = 32;
// Of each block.
inline int64_t summary_tasks(const Blocks& blocks) { return detail::ceil_div(blocks.chunks, kChunksPerTask); }

struct AttentionParams {
    Shape shape;
    int64_t first_head;                // task 0 is of this one of all B H
    Rows query, key, value;            // in
    int64_t num_landmarks;             // 0: window only
    Rows landmark_key, landmark_value; // in
    const void* landmark_bias;         // T [B, C] or null
    const void* landmark_entropy;      // T [B, H, C] or null: added to the landmarks' logits as well
    const int32_t* extents;            // [B or 1, C, 4]: box (y0, y1, x0, x1) of each chunk's valid members
    int64_t extents_batch_stride;
    const void* relative_bias; // T [H or 1, bias_height, bias_width] or null
    int64_t relative_bias_head_stride;
    const bool* key_padding_mask; // [B, N] or null
    bool exclude_window_landmarks;
    Dropout dropout;
    double scale;
    int64_t tasks;            // per (batch, head); where there are blocks, one each
    int64_t windows_per_task; // fewer in the last one
    int64_t tasks_per_piece;  // backward takes those of a piece in turn, the last one first
    int64_t pieces;           // per (batch, head)
    Rows output;              // forward: out; backward: in
    void* logsumexp;          // T [B, H, N]; forward: out; backward: in
    // backward
    Rows grad_output;                      // in
    Rows grad_query, grad_key, grad_value; // out
    void* grad_global_key;                 // T [heads, pieces, C + P, padded D], of landmarks and prefix keys
    void* grad_global_value;               // T [heads, pieces, C + P, padded D]
    void* grad_landmark_entropy;           // T [heads, pieces, C] or null
    void* grad_relative_bias;              // T [B H, pieces, bias_height * bias_width] or null
};

// What each token's gradients get from its chunks', from the results of the summaries' backward.
struct TermsParams {
    Shape shape;
    int64_t first_head;           // task 0 is of this one of all B H
    Rows key;                     // in
    const bool* key_padding_mask; // [B, N] or null
    bool tangent;
    const void* omega;
    const void* grad_beta;
    const void* grad_key_mean;
    const void* grad_query_mean;
    const void* member_terms;
    Rows grad_query, grad_key, grad_value; // added to
};

constexpr int64_t kTokensPerTask = 256;
// Of each block.
inline int64_t terms_tasks(const Blocks& blocks) { return detail::ceil_div(blocks.tokens, kTokensPerTask); }

// weight gradient[m, n] += sum_k linear[k, m] mean[k, n]
struct WeightGradParams {
    int64_t rows, head_dim;
    const void* grad_linear; // T [rows, padded D]
    const void* mean;        // T [rows, padded D]
    void* grad_weight;       // T [D, padded D]
};

constexpr int64_t kWeightRowsPerTask = 6;

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
    Projection key_projection, query_projection; // read where a chunk ends
    bool has_projection;                         // false: identity
    bool has_query_projection;                   // false beside has_projection: "key-only", mu = 0
    double norm_eps, scale;
    const void* relative_bias; // T [H or 1, 2 (window_size + overlap) - 1] or null
    int64_t relative_bias_head_stride;
    double landmark_bias;   // added to the logits of landmarks
    void* landmark_entropy; // T [B, H, num_landmarks], likewise, of tangents; else null
    bool exclude_window_landmarks;
    Rows output; // out
};

// One table per instruction set and dtype. Kernels run the tasks [begin, end) with a scratch of the size
// that the matching function returns; the result does not depend on how tasks are dealt to threads.
struct Kernels {
    size_t (*summary_scratch)(const SummaryParams&);
    void (*chunk_summary_fwd)(const SummaryParams&, int64_t begin, int64_t end, char* scratch);
    void (*chunk_summary_bwd)(const SummaryParams&, int64_t begin, int64_t end, char* scratch);
    void (*chunk_terms)(const TermsParams&, int64_t begin, int64_t end, char* scratch);
    size_t (*terms_scratch)(const TermsParams&);
    void (*weight_grad)(const WeightGradParams&, int64_t begin, int64_t end);
    size_t (*attention_scratch)(const AttentionParams&, bool backward);
    // `next`: the task that follows, or -1
    void (*window_attention_fwd)(const AttentionParams&, int64_t begin, int64_t end, int64_t next,
                                 char* scratch);
    void (*window_attention_bwd)(const AttentionParams&, int64_t begin, int64_t end, int64_t next,
                                 char* scratch);
    size_t (*prefix_scratch)(const AttentionParams&, bool backward);
    void (*prefix_attention_fwd)(const AttentionParams&, int64_t begin, int64_t end, char* scratch);
    void (*prefix_attention_bwd)(const AttentionParams&, int64_t begin, int64_t end, char* scratch);
    size_t (*decode_scratch)(const DecodeParams&);
    void (*decode_step)(const DecodeParams&, int64_t begin, int64_t end, char* scratch);
};

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

const Kernels& kernels(InstructionSet instruction_set, DType dtype);

namespace baseline {
const Kernels& table(DType dtype);
}
namespace avx2 {
const Kernels& table(DType dtype);
}
namespace avx512 {
const Kernels& table(DType dtype);
}

} // namespace eva_attn::cpu
