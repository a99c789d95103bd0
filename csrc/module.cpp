#include <pybind11/pybind11.h>

#include "build_facts.h" // written by setup.py

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

// Loading this library registers the operators; what Python gets from the module is how it was built.
PYBIND11_MODULE(_C, module) {
    module.def("build_info", [] {
        pybind11::dict info;
        info["torch"] = EVA_ATTN_TORCH;
        info["compiler"] = kCompiler;
        info["cuda"] = EVA_ATTN_WITH_CUDA != 0;
        info["cuda_version"] = static_cast<const char*>(EVA_ATTN_CUDA_VERSION);
        info["cuda_arches"] = static_cast<const char*>(EVA_ATTN_CUDA_ARCHES);
        info["cpu_only_reason"] = static_cast<const char*>(EVA_ATTN_CPU_ONLY_REASON);
        return info;
    });
}
