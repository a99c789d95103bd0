#pragma once

#include "cpu/support.h"

namespace eva_attn::cpu {

// An attention's params and the tensors that they point into.
class Attention {
  public:
    // Landmarks [B, H, C, D], or none; their entropies [B, H, C], of tangents.
    Attention(const Call& call, const Geometry& geometry, const OptionalTensor& landmark_key,
              const OptionalTensor& landmark_value, const OptionalTensor& landmark_entropy,
              const Tensor& output, const Tensor& logsumexp);

    void forward(std::vector<Stage>& stages) const;
    // Gradients of the tokens, and of landmarks and prefix keys, of `heads` of all B H at once:
    void backward(std::vector<Stage>& stages, const Tensor& grad_output, const Tensor& grad_query,
                  const Tensor& grad_key, const Tensor& grad_value, int64_t heads);
    int64_t blocks() const { return Blocks(params_.shape.geometry).count; }
    int64_t blocks_per_piece() const { return params_.tasks_per_piece; }
    void start_at(int64_t first_head) { params_.first_head = first_head; }
    // [heads, pieces, C + P, padded D], the landmarks' rows first.
    const Tensor& grad_global_key() const { return grad_global_key_; }
    const Tensor& grad_global_value() const { return grad_global_value_; }
    // [heads, pieces, C]; undefined without entropies.
    const Tensor& grad_landmark_entropy() const { return grad_landmark_entropy_; }
    // Once backward has run.
    void relative_bias_gradient(const Tensor& grad_relative_bias) const;

  private:
    const Kernels& kernels_;
    Tensor landmark_key_, landmark_value_, landmark_bias_, landmark_entropy_, extents_, relative_bias_, mask_,
        output_, logsumexp_;
    Tensor grad_global_key_, grad_global_value_, grad_landmark_entropy_, bias_terms_;
    AttentionParams params_;
};

} // namespace eva_attn::cpu
