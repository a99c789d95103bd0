#pragma once

#include "cuda/support.h"

namespace eva_attn::cuda {

// A summary's params and the tensors that they point into.
class Summary {
  public:
    Summary(const Call& call, const Geometry& geometry, const SummaryResults& results);

    void forward(cudaStream_t stream);
    // Landmark gradients [B H, pieces, at least C, D], of which a single piece may be rounded, and those of
    // tangents' entropies [B H, pieces, C]; writes the gradients of the weights.
    void backward(const Tensor& grad_landmark_key, const Tensor& grad_landmark_value,
                  const Tensor& grad_landmark_entropy, const Tensors<8>& grad_weights, cudaStream_t stream,
                  Room& room);

    // After backward: what the tokens' gradients need, for which tensor cores want it rounded.
    ChunkTerms chunk_terms(bool for_tensor_cores);
    const SummaryParams& params() const { return params_; }

  private:
    at::TensorOptions options() const { return at::dtype(accumulation_).device(device_); } // of sums
    // Room for means that are not kept, for kernels that need them.
    void allocate_means();
    // For means or omega that were not kept; landmarks are left nowhere.
    void forward_again(SummaryParams params, cudaStream_t stream) const;

    DType dtype_;
    at::ScalarType row_dtype_; // of queries, keys and values
    at::ScalarType accumulation_;
    at::Device device_;
    ProjectionTensors key_projection_, query_projection_;
    Tensor mask_, noise_, means_, grad_entropy_;
    Tensor omega_, grad_beta_, grad_key_mean_, grad_query_mean_, chunk_stats_, token_weight_, token_grad_;
    bool rounded_terms_ = false;
    SummaryParams params_;
};

} // namespace eva_attn::cuda
