#pragma once

#include "cpu/support.h"

namespace eva_attn::cpu {

// An attention's params and the tensors that they point into.
class Attention {
  public:
    // Landmarks [B, H, C, D], or none.
    Attention(const Call& call, const Geometry& geometry, const OptionalTensor& landmark_key,
              const OptionalTensor& landmark_value, const Tensor& output, const Tensor& logsumexp);

    void forward() const;

    // The backward's first half: gradients of landmarks and prefix keys.
    void backward_global(const Tensor& grad_output);
    // Its result [B H, pieces, C + P, padded D], the landmarks' rows first; undefined where C + P is 0.
    const Tensor& grad_global_key() const { return grad_global_key_; }
    const Tensor& grad_global_value() const { return grad_global_value_; }
    // Its second half, which writes all other gradients, with the tokens' share in their chunks added.
    void backward_tokens(const ChunkTerms& chunk_terms, const Tensor& grad_query, const Tensor& grad_key,
                         const Tensor& grad_value, const Tensor& grad_relative_bias);

  private:
    int64_t tasks() const { return params_.shape.batch * params_.shape.heads * params_.pieces; }

    const Kernels& kernels_;
    Tensor landmark_key_, landmark_value_, landmark_bias_, extents_, relative_bias_, mask_, output_,
        logsumexp_;
    Tensor grad_global_key_, grad_global_value_;
    AttentionParams params_;
};

} // namespace eva_attn::cpu
