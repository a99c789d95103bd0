#include "cpu/chunk_summary.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "ops/chunk_summary.h"

namespace eva_attn::cpu {

Summary::Summary(const Call& call, const Geometry& geometry, const Tensor& key_mean, const Tensor& query_mean,
                 const OptionalTensor& landmark_entropy)
    : kernels_(kernels_for(call.query.scalar_type())),
      key_projection_(projection_tensors(call.summary.key, key_mean.scalar_type())),
      query_projection_(projection_tensors(call.summary.query, key_mean.scalar_type())),
      mask_(contiguous(call.key_padding_mask, at::kBool)),
      noise_(contiguous(call.summary.noise, key_mean.scalar_type())), key_mean_(key_mean.contiguous()),
      query_mean_(query_mean.contiguous()),
      landmark_entropy_(contiguous(landmark_entropy, key_mean.scalar_type())),
      params_{
          .shape = shape_of(call, geometry),
          .first_head = 0,
          .query = rows(call.query),
          .key = rows(call.key),
          .value = rows(call.value),
          .key_padding_mask = mask_data(mask_),
          .noise = data(noise_),
          .key_projection = projection(key_projection_),
          .query_projection = projection(query_projection_),
          .has_projection = call.summary.key.weight.has_value(),
          .has_query_projection = call.summary.query.weight.has_value(),
          .tangent = call.summary.tangent,
          .scale = scale_of(call),
          .mu_scale = call.summary.tangent || geometry.is_causal ? 1 : 0.5,
          .norm_eps = call.summary.norm_eps,
          .mean_divisor = call.summary.mean_divisor.guard_int(__FILE__, __LINE__),
          .landmark_key = nullptr,
          .landmark_value = nullptr,
          .key_mean = data(key_mean_),
          .query_mean = data(query_mean_),
          .omega_rows = nullptr,
          .landmark_entropy = data(landmark_entropy_),
          .grad_landmark_key = nullptr,
          .grad_landmark_value = nullptr,
          .grad_landmark_entropy = nullptr,
          .pieces = 0,
          .piece_stride = 0,
          .head_piece_stride = 0,
          .blocks_per_piece = 1,
          .omega = nullptr,
          .grad_beta = nullptr,
          .grad_key_mean = nullptr,
          .grad_query_mean = nullptr,
          .member_terms = nullptr,
          .grad_key_linear = nullptr,
          .grad_query_linear = nullptr,
          .grad_vectors = nullptr,
      } {}

Stage Summary::forward(const Tensor& landmark_key, const Tensor& landmark_value,
                       const OptionalTensor& omega) {
    params_.landmark_key = data(landmark_key);
    params_.landmark_value = data(landmark_value);
    if (omega) params_.omega_rows = data(*omega);
    if (params_.has_projection && !params_.has_query_projection)
        query_mean_.zero_();                // the kernel has no use for it
    if (params_.tangent) key_mean_.zero_(); // likewise
    return stage(kernels_.chunk_summary_fwd, params_, tasks_per_head(), kernels_.summary_scratch(params_));
}

Stage Summary::backward(const Tensor& grad_landmark_key, const Tensor& grad_landmark_value,
                        const Tensor& grad_landmark_entropy, int64_t blocks_per_piece) {
    const Shape& shape = params_.shape;
    const int64_t heads = grad_landmark_key.size(0), num_rows = heads * shape.geometry.num_chunks();
    const int64_t width = padded(shape.head_dim);
    const auto options = key_mean_.options();
    for (Tensor* tensor : {&omega_, &grad_beta_, &grad_key_mean_, &grad_query_mean_})
        *tensor = at::empty({num_rows, width}, options);
    member_terms_ = at::empty({num_rows, chunk_size(shape.geometry), 2}, options);
    if (params_.has_projection) {
        grad_key_linear_ = at::empty({num_rows, width}, options);
        grad_query_linear_ = at::empty({num_rows, width}, options);
        grad_vectors_ = at::empty({heads * tasks_per_head(), 6, width}, options);
        grad_key_weight_ = at::zeros({shape.head_dim, width}, options);
        grad_query_weight_ = at::zeros({shape.head_dim, width}, options);
        grad_vectors_sum_ = at::zeros({6, width}, options);
    }

    params_.grad_landmark_key = data(grad_landmark_key);
    params_.grad_landmark_value = data(grad_landmark_value);
    if (params_.tangent) params_.grad_landmark_entropy = data(grad_landmark_entropy);
    params_.pieces = grad_landmark_key.size(1);
    params_.piece_stride = grad_landmark_key.size(2) * width;
    params_.blocks_per_piece = blocks_per_piece;
    params_.head_piece_stride = params_.pieces * params_.piece_stride;
    params_.omega = data(omega_);
    params_.grad_beta = data(grad_beta_);
    params_.grad_key_mean = data(grad_key_mean_);
    params_.grad_query_mean = data(grad_query_mean_);
    params_.member_terms = data(member_terms_);
    params_.grad_key_linear = data(grad_key_linear_);
    params_.grad_query_linear = data(grad_query_linear_);
    params_.grad_vectors = data(grad_vectors_);
    return stage(kernels_.chunk_summary_bwd, params_, tasks_per_head(), kernels_.summary_scratch(params_));
}

Stage Summary::add_to_tokens(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value) {
    terms_ = TermsParams{
        .shape = params_.shape,
        .first_head = params_.first_head,
        .key = params_.key,
        .key_padding_mask = params_.key_padding_mask,
        .tangent = params_.tangent,
        .omega = params_.omega,
        .grad_beta = params_.grad_beta,
        .grad_key_mean = params_.grad_key_mean,
        .grad_query_mean = params_.grad_query_mean,
        .member_terms = params_.member_terms,
        .grad_query = rows(grad_query),
        .grad_key = rows(grad_key),
        .grad_value = rows(grad_value),
    };
    const Blocks blocks(params_.shape.geometry);
    return stage(kernels_.chunk_terms, terms_, blocks.count * terms_tasks(blocks),
                 kernels_.terms_scratch(terms_));
}

void Summary::add_to_weights(int64_t heads) const {
    if (!params_.has_projection) return;
    add_in_order(grad_vectors_sum_, grad_vectors_.narrow(0, 0, heads * tasks_per_head()));
    add_to_weight(grad_key_weight_, grad_key_linear_, key_mean_, heads);
    if (params_.has_query_projection)
        add_to_weight(grad_query_weight_, grad_query_linear_, query_mean_, heads);
}

void Summary::add_to_weight(const Tensor& grad_weight, const Tensor& grad_linear, const Tensor& mean,
                            int64_t heads) const {
    const int64_t head_dim = params_.shape.head_dim;
    const Tensor rows = pad_rows(mean.flatten(0, 1).narrow(0, params_.first_head, heads));
    const WeightGradParams params{
        .rows = heads * params_.shape.geometry.num_chunks(),
        .head_dim = head_dim,
        .grad_linear = data(grad_linear),
        .mean = data(rows),
        .grad_weight = data(grad_weight),
    };
    at::parallel_for(0, detail::ceil_div(head_dim, kWeightRowsPerTask), 1,
                     [&](int64_t begin, int64_t end) { kernels_.weight_grad(params, begin, end); });
}

void Summary::weight_gradients(const Tensors<8>& grad_weights) const {
    if (!params_.has_projection) return;
    const int64_t head_dim = params_.shape.head_dim;
    const Tensor vectors = grad_vectors_sum_.narrow(1, 0, head_dim); // [6, D]
    const auto& [key_weight, key_bias, key_norm_weight, key_norm_bias, query_weight, query_bias,
                 query_norm_weight, query_norm_bias] = grad_weights;
    const auto copy = [&](const Tensor& gradient, const Tensor& given, int64_t vector) {
        if (given.defined()) gradient.copy_(vectors[vector]);
    };
    key_weight.copy_(grad_key_weight_.narrow(1, 0, head_dim));
    copy(key_bias, key_projection_.bias, 0);
    copy(key_norm_weight, key_projection_.norm_weight, 1);
    copy(key_norm_bias, key_projection_.norm_bias, 2);
    if (!params_.has_query_projection) return;
    query_weight.copy_(grad_query_weight_.narrow(1, 0, head_dim));
    copy(query_bias, query_projection_.bias, 3);
    copy(query_norm_weight, query_projection_.norm_weight, 4);
    copy(query_norm_bias, query_projection_.norm_bias, 5);
}

namespace {

void forward(const Call& call, const Tensors<5>& outputs) {
    const auto& [landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] = outputs;
    const Geometry geometry = concrete(call.geometry);
    Summary summary(call, geometry, key_mean, query_mean, landmark_entropy);
    run({summary.forward(landmark_key, landmark_value)}, call.query.size(0) * call.query.size(1),
        Blocks(geometry).count, Direction::kForward);
}

void backward(const Call& call, const OptionalTensor& grad_landmark_key,
              const OptionalTensor& grad_landmark_value, const OptionalTensor& grad_landmark_entropy,
              const Tensors<5>& outputs, const Tensors<11>& gradients) {
    const auto& [landmark_key, landmark_value, key_mean, query_mean, landmark_entropy] = outputs;
    const auto& [grad_query, grad_key, grad_value, w0, w1, w2, w3, w4, w5, w6, w7] = gradients;
    const Geometry geometry = concrete(call.geometry);
    const int64_t heads = call.query.size(0) * call.query.size(1), head_dim = call.query.size(3);
    Summary summary(call, geometry, key_mean, query_mean, landmark_entropy);

    const auto incoming = [&](const OptionalTensor& gradient) {
        const Tensor result =
            at::zeros({heads, 1, geometry.num_chunks(), padded(head_dim)}, key_mean.options());
        if (gradient) result.narrow(3, 0, head_dim).copy_(gradient->flatten(0, 1).unsqueeze(1));
        return result;
    };
    const Tensor landmark_key_terms = incoming(grad_landmark_key);
    const Tensor landmark_value_terms = incoming(grad_landmark_value);
    const Tensor entropy_terms =
        grad_landmark_entropy ? grad_landmark_entropy->contiguous() : at::zeros_like(landmark_entropy);
    for (const Tensor& gradient : {grad_query, grad_key, grad_value}) gradient.zero_();
    const int64_t blocks = Blocks(geometry).count;
    run({summary.backward(landmark_key_terms, landmark_value_terms, entropy_terms, blocks),
         summary.add_to_tokens(grad_query, grad_key, grad_value)},
        heads, blocks, Direction::kBackward);
    summary.add_to_weights(heads);
    summary.weight_gradients({w0, w1, w2, w3, w4, w5, w6, w7});
}

} // namespace

TORCH_LIBRARY_IMPL(eva_attn, CPU, m) { ChunkSummaryBackend<forward, backward>::implement(m); }

} // namespace eva_attn::cpu
