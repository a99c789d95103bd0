#include "cpu/chunk_summary.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ops/chunk_summary.h"

namespace eva_attn::cpu {

Summary::Summary(const Call& call, const Geometry& geometry, const Tensor& key_mean, const Tensor& query_mean)
    : kernels_(kernels_for(call.query.scalar_type())),
      key_projection_(projection_tensors(call.summary.key, key_mean.scalar_type())),
      query_projection_(projection_tensors(call.summary.query, key_mean.scalar_type())),
      mask_(contiguous(call.key_padding_mask, at::kBool)),
      noise_(contiguous(call.summary.noise, key_mean.scalar_type())), key_mean_(key_mean.contiguous()),
      query_mean_(query_mean.contiguous()),
      params_{
          .shape = shape_of(call, geometry),
          .query = rows(call.query),
          .key = rows(call.key),
          .value = rows(call.value),
          .key_padding_mask = mask_data(mask_),
          .noise = data(noise_),
          .key_projection = projection(key_projection_),
          .query_projection = projection(query_projection_),
          .has_projection = call.summary.key.weight.has_value(),
          .has_query_projection = call.summary.query.weight.has_value(),
          .scale = scale_of(call),
          .mu_scale = geometry.is_causal ? 1 : 0.5,
          .norm_eps = call.summary.norm_eps,
          .mean_divisor = call.summary.mean_divisor.guard_int(__FILE__, __LINE__),
          .landmark_key = nullptr,
          .landmark_value = nullptr,
          .key_mean = data(key_mean_),
          .query_mean = data(query_mean_),
          .grad_landmark_key = nullptr,
          .grad_landmark_value = nullptr,
          .pieces = 0,
          .piece_stride = 0,
          .head_piece_stride = 0,
          .omega = nullptr,
          .grad_beta = nullptr,
          .grad_key_mean = nullptr,
          .grad_query_mean = nullptr,
          .chunk_stats = nullptr,
          .grad_key_linear = nullptr,
          .grad_query_linear = nullptr,
          .grad_vectors = nullptr,
      } {}

Summary::ProjectionTensors Summary::projection_tensors(const ProjectionWeights& weights,
                                                       at::ScalarType accumulation) {
    const Tensor weight = contiguous(weights.weight, accumulation);
    return {.weight = weight.defined() ? pad_rows(weight) : Tensor(),
            .weight_t = weight.defined() ? pad_rows(weight.t()) : Tensor(),
            .bias = contiguous(weights.bias, accumulation),
            .norm_weight = contiguous(weights.norm_weight, accumulation),
            .norm_bias = contiguous(weights.norm_bias, accumulation)};
}

Projection Summary::projection(const ProjectionTensors& tensors) {
    return {.weight = data(tensors.weight),
            .weight_t = data(tensors.weight_t),
            .bias = data(tensors.bias),
            .norm_weight = data(tensors.norm_weight),
            .norm_bias = data(tensors.norm_bias)};
}

int64_t Summary::tasks() const {
    const Shape& shape = params_.shape;
    return shape.batch * shape.heads * detail::ceil_div(shape.geometry.num_chunks(), kChunksPerTask);
}

void Summary::forward(const Tensor& landmark_key, const Tensor& landmark_value) {
    params_.landmark_key = data(landmark_key);
    params_.landmark_value = data(landmark_value);
    if (params_.has_projection && !params_.has_query_projection)
        query_mean_.zero_(); // the kernel has no use for it
    run(kernels_.chunk_summary_fwd, kernels_.summary_scratch, params_, tasks());
}

void Summary::backward(const Tensor& grad_landmark_key, const Tensor& grad_landmark_value,
                       const Tensors<8>& grad_weights) {
    const Shape& shape = params_.shape;
    const int64_t num_rows = shape.batch * shape.heads * shape.geometry.num_chunks();
    const int64_t width = padded(shape.head_dim);
    const auto options = key_mean_.options();
    omega_ = at::empty({num_rows, width}, options);
    grad_beta_ = at::empty({num_rows, width}, options);
    grad_key_mean_ = at::empty({num_rows, width}, options);
    grad_query_mean_ = at::empty({num_rows, width}, options);
    chunk_stats_ = at::empty({num_rows, 2}, options.dtype(at::kDouble));
    Tensor grad_key_linear, grad_query_linear, grad_vectors;
    if (params_.has_projection) {
        grad_key_linear = at::empty({num_rows, width}, options);
        grad_query_linear = at::empty({num_rows, width}, options);
        grad_vectors = at::zeros({tasks(), 6, width}, options);
    }

    params_.grad_landmark_key = data(grad_landmark_key);
    params_.grad_landmark_value = data(grad_landmark_value);
    params_.pieces = grad_landmark_key.size(1);
    params_.piece_stride = grad_landmark_key.size(2) * width;
    params_.head_piece_stride = params_.pieces * params_.piece_stride;
    params_.omega = data(omega_);
    params_.grad_beta = data(grad_beta_);
    params_.grad_key_mean = data(grad_key_mean_);
    params_.grad_query_mean = data(grad_query_mean_);
    params_.chunk_stats = data(chunk_stats_);
    params_.grad_key_linear = data(grad_key_linear);
    params_.grad_query_linear = data(grad_query_linear);
    params_.grad_vectors = data(grad_vectors);
    run(kernels_.chunk_summary_bwd, kernels_.summary_scratch, params_, tasks());

    if (!params_.has_projection) return;
    const Tensor vectors = sum_in_order(grad_vectors).narrow(1, 0, shape.head_dim); // [6, D]
    const auto& [key_weight, key_bias, key_norm_weight, key_norm_bias, query_weight, query_bias,
                 query_norm_weight, query_norm_bias] = grad_weights;
    const auto copy = [&](const Tensor& gradient, const Tensor& given, int64_t vector) {
        if (given.defined()) gradient.copy_(vectors[vector]);
    };
    weight_gradient(grad_key_linear, key_mean_, key_weight);
    copy(key_bias, key_projection_.bias, 0);
    copy(key_norm_weight, key_projection_.norm_weight, 1);
    copy(key_norm_bias, key_projection_.norm_bias, 2);
    if (!params_.has_query_projection) return;
    weight_gradient(grad_query_linear, query_mean_, query_weight);
    copy(query_bias, query_projection_.bias, 3);
    copy(query_norm_weight, query_projection_.norm_weight, 4);
    copy(query_norm_bias, query_projection_.norm_bias, 5);
}

void Summary::weight_gradient(const Tensor& grad_linear, const Tensor& mean,
                              const Tensor& grad_weight) const {
    const int64_t head_dim = params_.shape.head_dim;
    const Tensor padded_mean = pad_rows(mean);
    const Tensor result = at::empty({head_dim, padded(head_dim)}, mean.options());
    const WeightGradParams params{
        .rows = grad_linear.size(0),
        .head_dim = head_dim,
        .grad_linear = data(grad_linear),
        .mean = data(padded_mean),
        .grad_weight = data(result),
    };
    at::parallel_for(0, detail::ceil_div(head_dim, kWeightRowsPerTask), 1,
                     [&](int64_t begin, int64_t end) { kernels_.weight_grad(params, begin, end); });
    grad_weight.copy_(result.narrow(1, 0, head_dim));
}

ChunkTerms Summary::chunk_terms() const {
    return {.omega = params_.omega,
            .grad_beta = params_.grad_beta,
            .grad_key_mean = params_.grad_key_mean,
            .grad_query_mean = params_.grad_query_mean,
            .chunk_stats = params_.chunk_stats};
}

namespace {

void forward(const Call& call, const Tensors<4>& outputs) {
    const auto& [landmark_key, landmark_value, key_mean, query_mean] = outputs;
    Summary(call, concrete(call.geometry), key_mean, query_mean).forward(landmark_key, landmark_value);
}

void backward(const Call& call, const OptionalTensor& grad_landmark_key,
              const OptionalTensor& grad_landmark_value, const Tensors<4>& outputs,
              const Tensors<11>& gradients) {
    const auto& [landmark_key, landmark_value, key_mean, query_mean] = outputs;
    const auto& [grad_query, grad_key, grad_value, w0, w1, w2, w3, w4, w5, w6, w7] = gradients;
    Summary summary(call, concrete(call.geometry), key_mean, query_mean);
    const SummaryParams& params = summary.params();
    const Shape& shape = params.shape;

    const auto incoming = [&](const OptionalTensor& gradient) {
        const Tensor result =
            at::zeros({shape.batch * shape.heads, 1, shape.geometry.num_chunks(), padded(shape.head_dim)},
                      key_mean.options());
        if (gradient) result.narrow(3, 0, shape.head_dim).copy_(gradient->flatten(0, 1).unsqueeze(1));
        return result;
    };
    const Tensor landmark_key_terms = incoming(grad_landmark_key);
    const Tensor landmark_value_terms = incoming(grad_landmark_value);
    summary.backward(landmark_key_terms, landmark_value_terms, {w0, w1, w2, w3, w4, w5, w6, w7});

    const Kernels& kernels = kernels_for(call.query.scalar_type());
    const TermsParams terms{
        .shape = shape,
        .key = params.key,
        .value = params.value,
        .key_padding_mask = params.key_padding_mask,
        .scale = params.scale,
        .chunk_terms = summary.chunk_terms(),
        .grad_query = rows(grad_query),
        .grad_key = rows(grad_key),
        .grad_value = rows(grad_value),
    };
    run(kernels.chunk_terms, kernels.terms_scratch, terms, shape.batch * shape.heads);
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CPU, m) { ChunkSummaryBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cpu
