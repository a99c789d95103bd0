#pragma once

#include "cuda/support.h"

namespace eva_attn::cuda {

// An attention's params and the tensors that they point into.
class Attention {
  public:
    Attention(const Call& call, const Geometry& geometry, int64_t num_landmarks,
              const SummaryResults& landmarks, const Tensor& output, const Tensor& logsumexp,
              cudaStream_t stream);

    void forward() const;

    // The backward's first half: gradients of landmarks and prefix keys.
    void backward_global(const Tensor& grad_output, Room& room);
    // Its result [B H, pieces, C + P, D], the landmarks' rows first; a single piece may be rounded.
    const Tensor& grad_global_key() const { return grad_global_key_; }
    const Tensor& grad_global_value() const { return grad_global_value_; }
    // [B H, pieces, C]; undefined without entropies.
    const Tensor& grad_landmark_entropy() const { return grad_landmark_entropy_; }
    // Whether tensor cores compute both.
    bool on_tensor_cores() const { return backward_.on_tensor_cores; }
    // Its second half, which writes all other gradients, with the tokens' share in their chunks added.
    void backward_tokens(const ChunkTerms& chunk_terms, const Tensor& grad_query, const Tensor& grad_key,
                         const Tensor& grad_value, const Tensor& grad_relative_bias);

  private:
    DType dtype_;
    cudaStream_t stream_;
    bool has_entropy_; // of landmarks
    Tensor landmark_bias_, extents_, relative_bias_, mask_, output_, logsumexp_;
    Tensor delta_, grad_global_key_, grad_global_value_, grad_landmark_entropy_;
    AttentionParams params_;
    AttentionBackward backward_{};
};

} // namespace eva_attn::cuda
