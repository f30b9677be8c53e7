//! What the device can do at most, measured: rooflines of `midpo bench --engine`.

use std::time::Instant;

use cudarc::driver::{result, sys};

use super::super::BackendError;
use super::super::cuda::{Driver, Gemm, Storage};
use super::super::open::DeviceLimits;
use super::{Device, DeviceMemory, refused};

/// Of a piece that is copied: far more than the L2 cache.
const COPY_BYTES: usize = 2 << 30;
/// Rows, columns and inputs of the product.
const PRODUCT: usize = 8192;
/// Copies and products of one repeat.
const ROUNDS: usize = 8;
/// Repeats of each limit, after one that is not counted.
const REPEATS: usize = 7;

impl Device {
    /// Copies device memory and multiplies matrices, for less than a second.
    ///
    /// # Errors
    /// The device; no room for 4 GB.
    pub fn limits(&self) -> Result<DeviceLimits, BackendError> {
        Ok(DeviceLimits {
            name: self.full_name()?,
            copy_bytes_per_second: self.copy_rates()?,
            bf16_ops_per_second: match self.has_cublaslt() {
                true => self.product_rates()?,
                false => Vec::new(),
            },
        })
    }

    fn full_name(&self) -> Result<String, BackendError> {
        let mut version = 0;
        // SAFETY: the library is there, and this call is in all its versions.
        let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
        asked.map_err(refused("cuDriverGetVersion"))?;
        Ok(format!(
            "{}, {} multiprocessors, driver of CUDA {}.{}",
            self.info()?.name,
            self.shape.multiprocessors,
            version / 1000,
            version % 1000 / 10
        ))
    }

    fn copy_rates(&self) -> Result<Vec<f64>, BackendError> {
        let [mut from, mut to] = [
            self.allocate("a piece to copy", COPY_BYTES)?,
            self.allocate("a copy", COPY_BYTES)?,
        ];
        self.zero(&mut from)?;
        self.zero(&mut to)?;
        // Read and written.
        self.rates(2.0 * COPY_BYTES as f64, || {
            let stream = self.stream.cu_stream();
            // SAFETY: both pieces are as long.
            let copied =
                unsafe { result::memcpy_dtod_async(to.address, from.address, COPY_BYTES, stream) };
            copied.map_err(refused("copying on the device"))
        })
    }

    fn product_rates(&self) -> Result<Vec<f64>, BackendError> {
        let bytes = PRODUCT * PRODUCT * 2;
        let operand = |seed| -> Result<DeviceMemory, BackendError> {
            let mut memory = self.allocate("an operand", bytes)?;
            self.upload(&mut memory, 0, bytemuck::cast_slice(&numbers(seed)))?;
            Ok(memory)
        };
        let (x, w) = (operand(1)?, operand(2)?);
        let y = self.allocate("a product", bytes)?;
        let gemm = Gemm {
            n: PRODUCT,
            o: PRODUCT,
            k: PRODUCT,
            storage: Storage::BF16,
            exact: false,
            add: false,
            y_stride: PRODUCT,
            x: x.address,
            w: w.address,
            y: y.address,
        };
        self.rates(2.0 * (PRODUCT as f64).powi(3), || {
            // SAFETY: the three pieces are as large as the shapes say.
            unsafe { Driver::gemm(self, &gemm) }.map(|_| ())
        })
    }

    /// `amount` over the seconds of one call of `work`, over the repeats.
    fn rates(
        &self,
        amount: f64,
        work: impl Fn() -> Result<(), BackendError>,
    ) -> Result<Vec<f64>, BackendError> {
        let mut rates = Vec::with_capacity(REPEATS + 1);
        for _ in 0..=REPEATS {
            self.wait()?;
            let begun = Instant::now();
            for _ in 0..ROUNDS {
                work()?;
            }
            self.wait()?;
            rates.push(amount * ROUNDS as f64 / begun.elapsed().as_secs_f64());
        }
        rates.remove(0);
        Ok(rates)
    }
}

/// bf16 from -1 to 1 with all their bits in use: from zeros or round numbers the device would run faster than it can.
fn numbers(seed: u32) -> Vec<u16> {
    let number = |i: usize| {
        let mixed = (i as u32 ^ seed).wrapping_mul(0x9E37_79B1);
        let mixed = (mixed ^ mixed >> 15).wrapping_mul(0x85EB_CA6B);
        let unit = (mixed >> 8) as f32 / (1 << 23) as f32 - 1.0;
        (unit.to_bits() >> 16) as u16
    };
    (0..PRODUCT * PRODUCT).map(number).collect()
}
