#pragma once

#include "cpu/support.h"

namespace eva_attn::cpu {

// A summary's params and the tensors that they point into.
class Summary {
  public:
    Summary(const Call& call, const Geometry& geometry, const Tensor& key_mean, const Tensor& query_mean);

    void forward(const Tensor& landmark_key, const Tensor& landmark_value);
    // Landmark gradients [B H, pieces, at least C, padded D]; writes the gradients of the weights.
    void backward(const Tensor& grad_landmark_key, const Tensor& grad_landmark_value,
                  const Tensors<8>& grad_weights);

    // After backward: what the tokens' gradients need.
    ChunkTerms chunk_terms() const;
    const SummaryParams& params() const { return params_; }

  private:
    struct ProjectionTensors {
        Tensor weight, weight_t, bias, norm_weight, norm_bias;
    };
    static ProjectionTensors projection_tensors(const ProjectionWeights& weights,
                                                at::ScalarType accumulation);
    static Projection projection(const ProjectionTensors& tensors);
    int64_t tasks() const;
    void weight_gradient(const Tensor& grad_linear, const Tensor& mean, const Tensor& grad_weight) const;

    const Kernels& kernels_;
    ProjectionTensors key_projection_, query_projection_;
    Tensor mask_, noise_, key_mean_, query_mean_;
    Tensor omega_, grad_beta_, grad_key_mean_, grad_query_mean_, chunk_stats_;
    SummaryParams params_;
};

} // namespace eva_attn::cpu
