#pragma once

#include <string>
#include <torch/library.h>

#define EVA_ATTN_WEIGHTS                                                                                     \
    "Tensor? key_weight=None, Tensor? key_bias=None, Tensor? key_norm_weight=None, "                         \
    "Tensor? key_norm_bias=None, Tensor? query_weight=None, Tensor? query_bias=None, "                       \
    "Tensor? query_norm_weight=None, Tensor? query_norm_bias=None"
#define EVA_ATTN_WEIGHT_GRADIENTS                                                                            \
    "Tensor grad_key_weight, Tensor grad_key_bias, Tensor grad_key_norm_weight, Tensor grad_key_norm_bias, " \
    "Tensor grad_query_weight, Tensor grad_query_bias, Tensor grad_query_norm_weight, "                      \
    "Tensor grad_query_norm_bias"

namespace eva_attn {

inline void define(torch::Library& m, const std::string& schema) {
    m.def(torch::schema(schema.c_str()), {at::Tag::pt2_compliant_tag});
}

} // namespace eva_attn
