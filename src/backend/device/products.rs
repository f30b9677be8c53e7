//! cublasLt: the vendor's products, looked for when the device is opened.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::sys;

use super::super::BackendError;
use super::super::cuda::{Driver, Gemm, Storage};
use super::{Device, DeviceMemory, unavailable};

/// What cublasLt may use beside its operands.
const WORKSPACE_BYTES: usize = 32 << 20;

/// cublasLt, and how it multiplies each shape that was asked for.
pub(super) struct Products {
    handle: lt_sys::cublasLtHandle_t,
    workspace: DeviceMemory,
    plans: RefCell<HashMap<Shape, Option<Plan>>>,
}

// SAFETY: a handle and descriptors of cublasLt may be used from any thread, one at a time.
unsafe impl Send for Products {}

/// What a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    n: usize,
    o: usize,
    k: usize,
    half: bool,
    exact: bool,
    add: bool,
    y_stride: usize,
}

/// Descriptors and algorithm of one shape.
struct Plan {
    product: lt_sys::cublasLtMatmulDesc_t,
    w: lt_sys::cublasLtMatrixLayout_t,
    x: lt_sys::cublasLtMatrixLayout_t,
    y: lt_sys::cublasLtMatrixLayout_t,
    algorithm: lt_sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was made once and is dropped once. There is nothing to do about an error.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.product);
            for layout in [self.w, self.x, self.y] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.plans.get_mut().clear();
        // SAFETY: made once, dropped once.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

impl Products {
    /// `None` where there is no cublasLt.
    pub(super) fn new(device: &Device) -> Result<Option<Self>, BackendError> {
        // SAFETY: it only looks for the library.
        if !unsafe { lt_sys::is_culib_present() } {
            tracing::warn!(
                "libcublasLt was not found: products run on our own kernels, which are slower; install CUDA 13's cuBLAS"
            );
            return Ok(None);
        }
        device.bind()?;
        let handle = lt::create_handle().map_err(|error| unavailable(error.to_string()))?;
        Ok(Some(Self {
            handle,
            workspace: device.allocate("cublasLt's workspace", WORKSPACE_BYTES)?,
            plans: RefCell::new(HashMap::new()),
        }))
    }

    /// Row-major y (n, o) = x W^T is column-major y^T (o, n) = W^T' x^T: W transposed, x as it is.
    fn plan(&self, gemm: &Gemm) -> Result<Plan, lt::CublasError> {
        use lt_sys::{cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType_t as Type};
        let operand = match gemm.storage {
            Storage::BF16 => Type::CUDA_R_16BF,
            Storage::F16 => Type::CUDA_R_16F,
        };
        let result_type = match gemm.exact {
            true => Type::CUDA_R_32F,
            false => operand,
        };
        let (n, o, k) = (gemm.n as u64, gemm.o as u64, gemm.k as u64);
        let mut plan = Plan {
            product: lt::create_matmul_desc(CUBLAS_COMPUTE_32F, Type::CUDA_R_32F)?,
            w: lt::create_matrix_layout(operand, k, o, gemm.k as i64)?,
            x: lt::create_matrix_layout(operand, k, n, gemm.k as i64)?,
            y: lt::create_matrix_layout(result_type, o, n, gemm.y_stride as i64)?,
            // SAFETY: plain numbers, set below before they are used.
            algorithm: unsafe { std::mem::zeroed() },
        };
        let transposed = 1i32;
        let attribute = lt_sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let value = std::ptr::from_ref(&transposed).cast();
        // SAFETY: live descriptors; the library copies the values.
        unsafe {
            lt::set_matmul_desc_attribute(plan.product, attribute, value, size_of::<i32>())?;
            let preference = lt::create_matmul_pref()?;
            let attribute = lt_sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let value = std::ptr::from_ref(&WORKSPACE_BYTES).cast();
            let size = size_of::<usize>();
            let found =
                lt::set_matmul_pref_attribute(preference, attribute, value, size).and_then(|()| {
                    lt::get_matmul_algo_heuristic(
                        self.handle,
                        plan.product,
                        plan.w,
                        plan.x,
                        plan.y,
                        plan.y,
                        preference,
                    )
                });
            lt::destroy_matmul_pref(preference)?;
            plan.algorithm = found?.algo;
        }
        Ok(plan)
    }

    /// `false` where cublasLt has no algorithm for the shape.
    pub(super) unsafe fn run(
        &self,
        gemm: &Gemm,
        stream: sys::CUstream,
    ) -> Result<bool, BackendError> {
        let shape = Shape {
            n: gemm.n,
            o: gemm.o,
            k: gemm.k,
            half: gemm.storage == Storage::F16,
            exact: gemm.exact,
            add: gemm.add,
            y_stride: gemm.y_stride,
        };
        let mut plans = self.plans.borrow_mut();
        let plan = plans.entry(shape).or_insert_with(|| self.plan(gemm).ok());
        let Some(plan) = plan else {
            return Ok(false);
        };
        let (one, beta) = (1.0f32, if gemm.add { 1.0f32 } else { 0.0 });
        // SAFETY: the caller's addresses span the shapes of the layouts; alpha and beta are read before the call returns.
        let started = unsafe {
            lt::matmul(
                self.handle,
                plan.product,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&beta).cast(),
                gemm.w as *const c_void,
                plan.w,
                gemm.x as *const c_void,
                plan.x,
                gemm.y as *const c_void,
                plan.y,
                gemm.y as *mut c_void,
                plan.y,
                &plan.algorithm,
                self.workspace.address as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        };
        started.map_err(|error| unavailable(format!("cublasLt: {error}")))?;
        Ok(true)
    }
}
