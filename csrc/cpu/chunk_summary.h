#pragma once

#include "cpu/support.h"

namespace eva_attn::cpu {

// A summary's params and the tensors that they point into.
class Summary {
  public:
    Summary(const Call& call, const Geometry& geometry, const Tensor& key_mean, const Tensor& query_mean,
            const OptionalTensor& landmark_entropy);

    // Omega [B, H, C, D] is left where there is room for it.
    Stage forward(const Tensor& landmark_key, const Tensor& landmark_value, const OptionalTensor& omega = {});
    // Landmark gradients [heads, pieces, at least C, padded D], of `heads` of all B H at once, and those of
    // tangents' entropies [heads, pieces, C].
    Stage backward(const Tensor& grad_landmark_key, const Tensor& grad_landmark_value,
                   const Tensor& grad_landmark_entropy, int64_t blocks_per_piece);
    // After it: adds what the tokens' gradients get from their chunks'.
    Stage add_to_tokens(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value);
    void start_at(int64_t first_head) { params_.first_head = terms_.first_head = first_head; }
    // Once backward has run for that many heads: adds their share to the gradients of the weights.
    void add_to_weights(int64_t heads) const;
    void weight_gradients(const Tensors<8>& grad_weights) const;

  private:
    int64_t tasks_per_head() const {
        const Blocks blocks(params_.shape.geometry);
        return blocks.count * summary_tasks(blocks);
    }
    void add_to_weight(const Tensor& grad_weight, const Tensor& grad_linear, const Tensor& mean,
                       int64_t heads) const;

    const Kernels& kernels_;
    ProjectionTensors key_projection_, query_projection_;
    Tensor mask_, noise_, key_mean_, query_mean_, landmark_entropy_;
    Tensor omega_, grad_beta_, grad_key_mean_, grad_query_mean_, member_terms_;
    Tensor grad_key_linear_, grad_query_linear_, grad_vectors_;
    Tensor grad_key_weight_, grad_query_weight_, grad_vectors_sum_;
    SummaryParams params_;
    TermsParams terms_{};
};

} // namespace eva_attn::cpu
