#include "ops/kernel_arguments.h"

#include <c10/util/Exception.h>
#include <cmath>

namespace eva_attn {

DType kernel_dtype(at::ScalarType dtype) {
    switch (dtype) {
    case at::kFloat:
        return DType::kFloat;
    case at::kDouble:
        return DType::kDouble;
    case at::kBFloat16:
        return DType::kBFloat16;
    case at::kHalf:
        return DType::kHalf;
    default:
        TORCH_CHECK_TYPE(false, "dtype must be Float, Double, BFloat16 or Half, got ", dtype);
    }
}

Shape shape_of(const Call& call, const Geometry& geometry) {
    return Shape{.batch = call.query.size(0),
                 .heads = call.query.size(1),
                 .head_dim = call.query.size(3),
                 .geometry = geometry};
}

double scale_of(const Call& call) {
    return call.scale.value_or(1 / std::sqrt(static_cast<double>(call.query.size(3))));
}

Dropout dropout_of(const AttentionOptions& options) {
    if (options.dropout_p == 0) return Dropout{.seed = 0, .threshold = 0, .scale = 1};
    return Dropout{.seed = 0,
                   .threshold = static_cast<uint64_t>(std::ceil(std::ldexp(options.dropout_p, 32))),
                   .scale = 1 / (1 - options.dropout_p)};
}

Tensor contiguous(const OptionalTensor& tensor, at::ScalarType dtype) {
    if (!tensor) return {};
    // The usual case, without two trips through the dispatcher.
    if (tensor->scalar_type() == dtype && tensor->is_contiguous()) return *tensor;
    return tensor->to(dtype).contiguous();
}

} // namespace eva_attn
