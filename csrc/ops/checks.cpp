#include "ops/checks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <cmath>

namespace eva_attn {
namespace {

bool holds(const c10::SymBool& condition) { return condition.expect_true(__FILE__, __LINE__); }

bool is_supported(at::ScalarType dtype) {
    return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

void check_floating(const char* name, const Tensor& tensor) {
    TORCH_CHECK_TYPE(is_supported(tensor.scalar_type()), name,
                     " must be Float, Double, BFloat16 or Half, got ", tensor.scalar_type());
}

void check_pair(const char* name, c10::SymIntArrayRef pair, int64_t minimum) {
    TORCH_CHECK_VALUE(pair.size() == 2, name, " must hold two integers (y, x), got ", pair);
    TORCH_CHECK_VALUE(holds(pair[0].sym_ge(minimum)) && holds(pair[1].sym_ge(minimum)), name,
                      " must be at least ", minimum, ", got ", pair);
}

// Sizes beyond any grid mean the whole grid; capped, their sums do not overflow.
c10::SymInt capped(const c10::SymInt& size) {
    constexpr int64_t kMost = int64_t{1} << 40;
    const auto known = size.maybe_as_int();
    return known && *known > kMost ? c10::SymInt(kMost) : size;
}

void check_shape(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape) {
    const auto sizes = tensor.sym_sizes();
    bool equal = sizes.size() == shape.size();
    for (size_t i = 0; equal && i < shape.size(); ++i) {
        equal = holds(sizes[i].sym_eq(shape[i]));
    }
    TORCH_CHECK_VALUE(equal, name, " must have shape ", shape, ", got ", sizes);
}

void check_device(const char* name, const Tensor& tensor, const at::Device& device) {
    TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on the query's device ", device, ", got ",
                      tensor.device());
}

void check_dtype(const char* name, const Tensor& tensor, at::ScalarType dtype) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
}

// Query's dtype or float32.
void check_parameter(const char* name, const OptionalTensor& tensor, c10::SymIntArrayRef shape,
                     const Tensor& query) {
    if (!tensor) return;
    check_shape(name, *tensor, shape);
    check_device(name, *tensor, query.device());
    TORCH_CHECK_TYPE(tensor->scalar_type() == query.scalar_type() || tensor->scalar_type() == at::kFloat,
                     name, " must be ", query.scalar_type(), " (query's dtype) or Float, got ",
                     tensor->scalar_type());
}

void check_projection(const std::string& prefix, const ProjectionWeights& weights, const Tensor& query) {
    const auto dim = query.sym_size(3);
    check_parameter((prefix + "_weight").c_str(), weights.weight, {dim, dim}, query);
    check_parameter((prefix + "_bias").c_str(), weights.bias, {dim}, query);
    check_parameter((prefix + "_norm_weight").c_str(), weights.norm_weight, {dim}, query);
    check_parameter((prefix + "_norm_bias").c_str(), weights.norm_bias, {dim}, query);
    TORCH_CHECK_VALUE(weights.weight || !(weights.bias || weights.norm_weight || weights.norm_bias), prefix,
                      "_bias, ", prefix, "_norm_weight and ", prefix, "_norm_bias need ", prefix,
                      "_weight, which is None");
    TORCH_CHECK_VALUE(weights.norm_weight || !weights.norm_bias, prefix, "_norm_bias needs ", prefix,
                      "_norm_weight, which is None");
}

} // namespace

SymGeometry make_geometry(c10::SymIntArrayRef grid_size, c10::SymIntArrayRef window_size,
                          c10::SymIntArrayRef chunk_size, c10::SymIntArrayRef overlap,
                          c10::SymIntArrayRef chunk_overlap, c10::SymInt num_prefix_tokens, bool is_causal) {
    TORCH_CHECK_VALUE(grid_size.size() == 2, "grid_size must hold two integers (y, x), got ", grid_size);
    check_pair("window_size", window_size, 1);
    check_pair("chunk_size", chunk_size, 1);
    check_pair("overlap", overlap, 0);
    check_pair("chunk_overlap", chunk_overlap, 0);
    return SymGeometry{
        .grid_height = grid_size[0],
        .grid_width = grid_size[1],
        .window_height = capped(window_size[0]),
        .window_width = capped(window_size[1]),
        .chunk_height = capped(chunk_size[0]),
        .chunk_width = capped(chunk_size[1]),
        .overlap_y = capped(overlap[0]),
        .overlap_x = capped(overlap[1]),
        .chunk_overlap_y = capped(chunk_overlap[0]),
        .chunk_overlap_x = capped(chunk_overlap[1]),
        .num_prefix_tokens = std::move(num_prefix_tokens),
        .is_causal = is_causal,
    };
}

void check_qkv(const Tensor& qkv) {
    check_floating("qkv", qkv);
    TORCH_CHECK_VALUE(qkv.dim() == 5 && holds(qkv.sym_size(2).sym_eq(3)),
                      "qkv must have shape [batch, tokens, 3, heads, head_dim], got ", qkv.sym_sizes());
}

void check_inputs(const Call& call) {
    const Tensor& query = call.query;
    TORCH_CHECK_VALUE(query.dim() == 4, "query must have shape [batch, heads, tokens, head_dim], got ",
                      query.sym_sizes());
    TORCH_CHECK_VALUE(holds(query.sym_size(3).sym_ge(1)),
                      "query must have a head_dim of at least 1, got shape ", query.sym_sizes());
    check_floating("query", query);
    check_matches("key", call.key, query.sym_sizes(), query.scalar_type(), query.device());
    check_matches("value", call.value, query.sym_sizes(), query.scalar_type(), query.device());

    const SymGeometry& geometry = call.geometry;
    const auto num_tokens = query.sym_size(2);
    TORCH_CHECK_VALUE(holds(geometry.num_prefix_tokens.sym_ge(0)) &&
                          holds(geometry.num_prefix_tokens.sym_le(num_tokens)),
                      "num_prefix_tokens must be between 0 and the number of tokens, ", num_tokens, ", got ",
                      geometry.num_prefix_tokens);
    check_pair("grid_size", {geometry.grid_height, geometry.grid_width}, 0);
    const auto fits = [&](const c10::SymInt& side) { // so that their product does not overflow
        const auto known = side.maybe_as_int(), most = num_tokens.maybe_as_int();
        return !known || !most || *known <= std::max<int64_t>(*most, 1);
    };
    TORCH_CHECK_VALUE(fits(geometry.grid_height) && fits(geometry.grid_width) &&
                          holds(geometry.num_tokens().sym_eq(num_tokens)),
                      "grid_size (", geometry.grid_height, ", ", geometry.grid_width, ") must cover the ",
                      num_tokens, " tokens less ", geometry.num_prefix_tokens, " prefix tokens");
    if (geometry.is_causal) {
        TORCH_CHECK_VALUE(holds(geometry.grid_height.sym_eq(1)),
                          "is_causal needs a sequence, that is a grid_size of height 1, got height ",
                          geometry.grid_height);
        TORCH_CHECK_VALUE(holds(geometry.num_prefix_tokens.sym_eq(0)),
                          "is_causal does not support prefix tokens, got num_prefix_tokens ",
                          geometry.num_prefix_tokens);
        TORCH_CHECK_VALUE(holds(geometry.chunk_overlap_y.sym_eq(0)) &&
                              holds(geometry.chunk_overlap_x.sym_eq(0)),
                          "is_causal needs a chunk_overlap of 0, got (", geometry.chunk_overlap_y, ", ",
                          geometry.chunk_overlap_x, ")");
    }

    const auto batch = query.sym_size(0);
    if (const auto& mask = call.key_padding_mask) {
        TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool,
                         "key_padding_mask must be Bool (True: padding), got ", mask->scalar_type());
        check_shape("key_padding_mask", *mask, {batch, num_tokens});
        check_device("key_padding_mask", *mask, query.device());
    }
    TORCH_CHECK_VALUE(!call.scale || std::isfinite(*call.scale), "scale must be finite, got ", *call.scale);
}

void check_summary(const Call& call) {
    const SummaryOptions& options = call.summary;
    const Tensor& query = call.query;
    check_projection("key", options.key, query);
    check_projection("query", options.query, query);
    TORCH_CHECK_VALUE(options.key.weight || !options.query.weight,
                      "query_weight needs key_weight, which is None");
    TORCH_CHECK_VALUE(!options.tangent || !options.key.weight,
                      "tangent needs a key_weight of None, as tangents have no projections");
    check_parameter("noise", options.noise,
                    {query.sym_size(0), query.sym_size(1), call.geometry.num_chunks(), query.sym_size(3)},
                    query);
    TORCH_CHECK_VALUE(std::isfinite(options.norm_eps) && options.norm_eps >= 0,
                      "norm_eps must be finite and not negative, got ", options.norm_eps);
    TORCH_CHECK_VALUE(holds(options.mean_divisor.sym_ge(0)),
                      "mean_divisor must be 0 (the number of valid tokens) or positive, got ",
                      options.mean_divisor);
}

void check_attention(const Call& call) {
    const AttentionOptions& options = call.attention;
    const SymGeometry& geometry = call.geometry;
    const Tensor& query = call.query;
    if (geometry.is_causal) {
        TORCH_CHECK_VALUE(holds((geometry.window_width % geometry.chunk_width).sym_eq(0)),
                          "is_causal needs a chunk_size that divides window_size, got chunk_size ",
                          geometry.chunk_width, " and window_size ", geometry.window_width);
    }

    TORCH_CHECK_VALUE(call.landmark_key.has_value() == call.landmark_value.has_value(),
                      "landmark_key and landmark_value must be given together, got only ",
                      call.landmark_key ? "landmark_key" : "landmark_value");
    const c10::SymInt shape[] = {query.sym_size(0), query.sym_size(1), geometry.num_chunks(),
                                 query.sym_size(3)};
    if (call.landmark_key) {
        check_matches("landmark_key", *call.landmark_key, shape, query.scalar_type(), query.device());
        check_matches("landmark_value", *call.landmark_value, shape, query.scalar_type(), query.device());
    }
    check_parameter("landmark_bias", options.landmark_bias, {query.sym_size(0), geometry.num_chunks()},
                    query);
    check_parameter("landmark_entropy", options.landmark_entropy,
                    {query.sym_size(0), query.sym_size(1), geometry.num_chunks()}, query);
    TORCH_CHECK_VALUE(call.landmark_key || !options.landmark_entropy,
                      "landmark_entropy needs landmark_key, which is None");

    if (const auto& bias = options.relative_bias) {
        TORCH_CHECK_VALUE(bias->dim() == 3, "relative_bias must have shape [heads or 1, ",
                          geometry.bias_height(), ", ", geometry.bias_width(), "], got ", bias->sym_sizes());
        const bool shared = TORCH_GUARD_OR_FALSE(bias->sym_size(0).sym_eq(1));
        check_parameter(
            "relative_bias", bias,
            {shared ? c10::SymInt(1) : query.sym_size(1), geometry.bias_height(), geometry.bias_width()},
            query);
    }

    TORCH_CHECK_VALUE(options.dropout_p >= 0 && options.dropout_p < 1, "dropout_p must be in [0, 1), got ",
                      options.dropout_p);
    TORCH_CHECK_VALUE(options.dropout_seed.has_value() == (options.dropout_p > 0),
                      "dropout_seed must be given if and only if dropout_p is positive, got dropout_p ",
                      options.dropout_p, options.dropout_seed ? " and a seed" : " and no seed");
    if (const auto& seed = options.dropout_seed) {
        check_dtype("dropout_seed", *seed, at::kLong);
        TORCH_CHECK_VALUE(seed->dim() == 0, "dropout_seed must be a scalar tensor, got shape ",
                          seed->sym_sizes());
        check_device("dropout_seed", *seed, query.device());
    }
}

void check_matches(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape, at::ScalarType dtype,
                   at::Device device) {
    check_shape(name, tensor, shape);
    check_dtype(name, tensor, dtype);
    check_device(name, tensor, device);
}

at::ScalarType accumulation_dtype(at::ScalarType dtype) {
    return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor empty_tokens(const Tensor& query) {
    // One trip through the dispatcher, where a transposition would be another.
    const auto sizes = query.sym_sizes();
    const c10::SymInt per_token = sizes[1] * sizes[3];
    const c10::SymInt strides[] = {sizes[2] * per_token, sizes[3], per_token, 1};
    return at::empty_strided_symint(sizes, strides, query.options());
}

Tensor empty_beside(const Tensor& query, c10::SymIntArrayRef shape, at::ScalarType dtype) {
    return at::empty_symint(shape, query.options().dtype(dtype));
}

Tensor empty_gradient(const Tensor& query, const OptionalTensor& tensor) {
    if (!tensor) return at::empty({0}, query.options());
    return at::empty_symint(tensor->sym_sizes(), tensor->options());
}

Tensors<8> empty_weight_gradients(const Call& call) {
    const auto& [key, query, noise, norm_eps, mean_divisor, tangent] = call.summary;
    const auto empty = [&](const OptionalTensor& weight) { return empty_gradient(call.query, weight); };
    return {empty(key.weight),   empty(key.bias),   empty(key.norm_weight),   empty(key.norm_bias),
            empty(query.weight), empty(query.bias), empty(query.norm_weight), empty(query.norm_bias)};
}

Geometry concrete(const SymGeometry& g) {
    const auto integer = [](const c10::SymInt& size) { return size.guard_int(__FILE__, __LINE__); };
    return Geometry::from(BasicGeometry<int64_t>{
        .grid_height = integer(g.grid_height),
        .grid_width = integer(g.grid_width),
        .window_height = integer(g.window_height),
        .window_width = integer(g.window_width),
        .chunk_height = integer(g.chunk_height),
        .chunk_width = integer(g.chunk_width),
        .overlap_y = integer(g.overlap_y),
        .overlap_x = integer(g.overlap_x),
        .chunk_overlap_y = integer(g.chunk_overlap_y),
        .chunk_overlap_x = integer(g.chunk_overlap_x),
        .num_prefix_tokens = integer(g.num_prefix_tokens),
        .is_causal = g.is_causal,
    });
}

} // namespace eva_attn
