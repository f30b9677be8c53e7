//! Causal self-attention of several sequences laid end to end, with the rotary embedding: from stacked q, k, v to the heads'
//! outputs. Query heads that share a K/V head are one matrix, so that grouped-query attention copies nothing.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, Device, Error, Layout, Result, Shape, Tensor};

use super::math::{dot, exp_row, max, scale};
use super::{numbers, output, read};

/// Sizes of the heads.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Heads {
    /// Query heads.
    pub query: usize,
    /// K/V heads; divides `query`.
    pub kv: usize,
    /// Of a head, even.
    pub size: usize,
}

impl Heads {
    /// Of a row of [q ; k ; v].
    fn width(self) -> usize {
        (self.query + 2 * self.kv) * self.size
    }

    /// Query heads of a K/V head.
    fn group(self) -> usize {
        self.query / self.kv.max(1)
    }
}

/// Sequences of about one length, computed as one batch: candle looks up the number of CPUs at every matmul (35 us), so few large
/// ones are better than many small ones.
struct Group {
    /// Tokens of the longest; t of the shapes below.
    longest: usize,
    /// First row and tokens of each; b of the shapes below.
    members: Vec<(usize, usize)>,
}

/// What the backward pass needs of a group; g = query heads of a K/V head. Rows beyond a sequence's end are 0 in q, k, v: no real row
/// looks at them, and their own results are dropped.
struct Saved {
    /// (b * kv, g * t, size), turned, times 1 / sqrt(size).
    q: Tensor,
    /// (b * kv, t, size), turned.
    k: Tensor,
    /// (b * kv, t, size).
    v: Tensor,
    /// (b * kv, g * t, t): softmax, 0 above the diagonal.
    p: Tensor,
}

struct Attention {
    heads: Heads,
    /// (positions, size): cosines, then sines.
    rope: Arc<[f32]>,
    groups: Vec<Group>,
    /// Filled by a forward pass that will be followed by a backward one.
    saved: Option<OnceLock<Vec<Saved>>>,
}

/// [q ; k ; v] (n, (query + 2 kv) * size), n = sum of `lengths`: (n, query * size). `rope`: (positions, size).
pub(in super::super) fn attention(
    qkv: &Tensor,
    heads: Heads,
    rope: Arc<[f32]>,
    lengths: &[usize],
) -> Result<Tensor> {
    let (n, _) = qkv.dims2()?;
    let longest = lengths.iter().max().copied().unwrap_or(0);
    let positions = rope.len() / heads.size;
    if lengths.iter().sum::<usize>() != n || longest > positions {
        let reason = format!(
            "sequences of up to {longest} tokens in {n} rows: expected as many rows as tokens, and at most {positions} tokens each"
        );
        return Err(Error::Msg(reason));
    }
    let saved = qkv.track_op().then(OnceLock::new);
    qkv.apply_op1(Attention {
        heads,
        rope,
        groups: groups(lengths),
        saved,
    })
}

/// Sequences with at least three quarters of the tokens of their group's longest: less than half of a group's work is padding.
fn groups(lengths: &[usize]) -> Vec<Group> {
    let starts = lengths.iter().scan(0, |next, length| {
        let start = *next;
        *next += length;
        Some((start, *length))
    });
    let mut sequences: Vec<(usize, usize)> = starts.filter(|(_, length)| *length > 0).collect();
    sequences.sort_by_key(|(start, length)| (std::cmp::Reverse(*length), *start));
    let mut groups: Vec<Group> = Vec::new();
    for (start, length) in sequences {
        match groups.last_mut() {
            Some(group) if 4 * length >= 3 * group.longest => group.members.push((start, length)),
            _ => groups.push(Group {
                longest: length,
                members: vec![(start, length)],
            }),
        }
    }
    groups
}

/// Turns the pairs (i, i + size / 2) of a head by the angles of a row of the rope table; back with `back`.
fn turn(head: &mut [f32], angles: &[f32], back: bool) {
    let half = head.len() / 2;
    let (low, high) = head.split_at_mut(half);
    let (cosines, sines) = angles.split_at(half);
    let sign = if back { -1.0 } else { 1.0 };
    for (((low, high), cosine), sine) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
        let (x, y, sine) = (*low, *high, sign * sine);
        *low = x * cosine - y * sine;
        *high = y * cosine + x * sine;
    }
}

/// Softmax of each row over its past; rows of `t` columns, row i sees columns 0..=i % t.
fn causal_softmax(scores: &mut [f32], t: usize) {
    for (index, row) in scores.chunks_exact_mut(t).enumerate() {
        let (seen, future) = row.split_at_mut(index % t + 1);
        let total = exp_row(seen, max(seen));
        scale(seen, 1.0 / total);
        future.fill(0.0);
    }
}

/// dS = P * (dP - rowsum(P * dP)), in place of dP.
fn softmax_backward(p: &[f32], dp: &mut [f32], t: usize) {
    let rows = p.chunks_exact(t).zip(dp.chunks_exact_mut(t));
    for (index, (p, dp)) in rows.enumerate() {
        let (seen, future) = dp.split_at_mut(index % t + 1);
        let along = dot(p.get(..seen.len()).unwrap_or_default(), seen);
        for (dp, p) in seen.iter_mut().zip(p) {
            *dp = p * (*dp - along);
        }
        future.fill(0.0);
    }
}

/// `count` heads from the `first` on in rows of `width` numbers.
#[derive(Clone, Copy)]
struct Part {
    width: usize,
    first: usize,
    count: usize,
    /// Turned by position and multiplied by this; `None`: as they are.
    turned: Option<f32>,
}

impl Attention {
    /// The parts of a row of [q ; k ; v], and of one of the heads' outputs.
    fn parts(&self) -> [Part; 4] {
        let Heads { query, kv, size } = self.heads;
        let part = |width, first, count, turned| Part {
            width,
            first,
            count,
            turned,
        };
        let width = self.heads.width();
        let factor = 1.0 / (size as f32).sqrt();
        [
            part(width, 0, query, Some(factor)),
            part(width, query, kv, Some(1.0)),
            part(width, query + kv, kv, None),
            part(query * size, 0, query, None),
        ]
    }

    /// (n, part.width) to (b * count, t, size).
    fn gather(&self, group: &Group, rows: &[f32], part: Part) -> Vec<f32> {
        let (size, t) = (self.heads.size, group.longest);
        let mut gathered = vec![0.0; group.members.len() * part.count * t * size];
        let mut blocks = gathered.chunks_exact_mut(t * size);
        for (start, length) in &group.members {
            for (head, block) in (part.first..).zip(blocks.by_ref().take(part.count)) {
                let rows = rows.chunks_exact(part.width).skip(*start).take(*length);
                let angles = self.rope.chunks_exact(size);
                for ((out, row), angles) in block.chunks_exact_mut(size).zip(rows).zip(angles) {
                    let values = row.get(head * size..(head + 1) * size);
                    out.copy_from_slice(values.unwrap_or(angles));
                    if let Some(factor) = part.turned {
                        turn(out, angles, false);
                        scale(out, factor);
                    }
                }
            }
        }
        gathered
    }

    /// The reverse of [`Attention::gather`].
    fn scatter(&self, group: &Group, gathered: &[f32], rows: &mut [f32], part: Part) {
        let (size, t) = (self.heads.size, group.longest);
        let mut blocks = gathered.chunks_exact(t * size);
        for (start, length) in &group.members {
            for (head, block) in (part.first..).zip(blocks.by_ref().take(part.count)) {
                let rows = rows.chunks_exact_mut(part.width).skip(*start).take(*length);
                let angles = self.rope.chunks_exact(size);
                for ((row, values), angles) in rows.zip(block.chunks_exact(size)).zip(angles) {
                    let Some(out) = row.get_mut(head * size..(head + 1) * size) else {
                        continue;
                    };
                    out.copy_from_slice(values);
                    if let Some(factor) = part.turned {
                        turn(out, angles, true);
                        scale(out, factor);
                    }
                }
            }
        }
    }

    /// (b * kv, rows, size).
    fn matrix(&self, group: &Group, values: Vec<f32>, rows: usize) -> Result<Tensor> {
        let batch = group.members.len() * self.heads.kv;
        Tensor::from_vec(values, (batch, rows, self.heads.size), &Device::Cpu)
    }

    /// One group of `qkv`: its rows of `y`, and what is saved.
    fn group_forward(&self, group: &Group, qkv: &[f32], y: &mut [f32]) -> Result<Saved> {
        let (t, stacked) = (group.longest, self.heads.group() * group.longest);
        let [q, k, v, out] = self.parts();
        let q = self.matrix(group, self.gather(group, qkv, q), stacked)?;
        let k = self.matrix(group, self.gather(group, qkv, k), t)?;
        let v = self.matrix(group, self.gather(group, qkv, v), t)?;
        let scores = q.matmul(&k.transpose(1, 2)?)?;
        let mut p = into_numbers(&scores)?;
        causal_softmax(&mut p, t);
        let p = Tensor::from_vec(p, scores.shape(), &Device::Cpu)?;
        read(&p.matmul(&v)?, |heads| self.scatter(group, heads, y, out))?;
        Ok(Saved { q, k, v, p })
    }

    /// One group of `dy` to its rows of `d`.
    fn group_backward(
        &self,
        group: &Group,
        saved: &Saved,
        dy: &[f32],
        d: &mut [f32],
    ) -> Result<()> {
        let (t, stacked) = (group.longest, self.heads.group() * group.longest);
        let [q, k, v, out] = self.parts();
        let dy = self.matrix(group, self.gather(group, dy, out), stacked)?;
        let dv = saved.p.transpose(1, 2)?.matmul(&dy)?;
        let mut ds = into_numbers(&dy.matmul(&saved.v.transpose(1, 2)?)?)?;
        read(&saved.p, |p| softmax_backward(p, &mut ds, t))?;
        let ds = Tensor::from_vec(ds, saved.p.shape(), &Device::Cpu)?;
        let dq = ds.matmul(&saved.k)?;
        let dk = ds.transpose(1, 2)?.matmul(&saved.q)?;
        read(&dq, |dq| self.scatter(group, dq, d, q))?;
        read(&dk, |dk| self.scatter(group, dk, d, k))?;
        read(&dv, |dv| self.scatter(group, dv, d, v))
    }
}

/// A copy of a tensor's numbers.
fn into_numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    read(tensor, <[f32]>::to_vec)
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = numbers(storage, layout)?;
        let (n, _) = layout.shape().dims2()?;
        let out = self.heads.query * self.heads.size;
        let mut y = vec![0.0; n * out];
        let mut saved = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let kept = self.group_forward(group, qkv, &mut y)?;
            if self.saved.is_some() {
                saved.push(kept);
            }
        }
        if let Some(cell) = &self.saved {
            // A second forward pass of the same node would save the same.
            let _ = cell.set(saved);
        }
        output(y, (n, out))
    }

    fn bwd(&self, qkv: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let saved = self.saved.as_ref().and_then(OnceLock::get);
        let saved = saved.ok_or_else(|| Error::Msg("attention: no forward pass".to_owned()))?;
        let mut d = vec![0.0; qkv.elem_count()];
        for (group, saved) in self.groups.iter().zip(saved) {
            read(dy, |dy| self.group_backward(group, saved, dy, &mut d))??;
        }
        Tensor::from_vec(d, qkv.shape(), qkv.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::check;
    use super::*;

    const ROPE: [f32; 5 * 4] = [
        1.0, 1.0, 0.0, 0.0, 0.6, 0.8, 0.8, 0.6, 0.0, 0.28, 1.0, 0.96, -0.6, 0.96, 0.8, 0.28, -0.8,
        0.0, -0.6, 1.0,
    ];

    /// The same, of candle's ops, a query head at a time: x (t, width) of one sequence.
    fn composed_sequence(x: &Tensor, heads: Heads) -> Tensor {
        let t = x.dim(0).unwrap();
        let half = heads.size / 2;
        let table = Tensor::from_slice(&ROPE, (5, 4), &Device::Cpu).unwrap();
        let table = table.narrow(0, 0, t).unwrap();
        let (cos, sin) = (
            table.narrow(1, 0, half).unwrap(),
            table.narrow(1, half, half).unwrap(),
        );
        let head = |index: usize| x.narrow(1, index * heads.size, heads.size).unwrap();
        let turned = |x: Tensor| {
            let (a, b) = (
                x.narrow(1, 0, half).unwrap(),
                x.narrow(1, half, half).unwrap(),
            );
            let low = ((&a * &cos).unwrap() - (&b * &sin).unwrap()).unwrap();
            let high = ((&b * &cos).unwrap() + (&a * &sin).unwrap()).unwrap();
            Tensor::cat(&[low, high], 1).unwrap()
        };
        let mask: Vec<f32> = (0..t * t)
            .map(|i| if i % t > i / t { -1e9 } else { 0.0 })
            .collect();
        let mask = Tensor::from_vec(mask, (t, t), &Device::Cpu).unwrap();
        let outputs: Vec<Tensor> = (0..heads.query)
            .map(|q| {
                let kv = q / heads.group();
                let k = turned(head(heads.query + kv));
                let v = head(heads.query + heads.kv + kv);
                let scores = turned(head(q)).matmul(&k.t().unwrap()).unwrap();
                let scores = ((scores / (heads.size as f64).sqrt()).unwrap() + &mask).unwrap();
                let e = scores.exp().unwrap();
                let p = e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap();
                p.matmul(&v).unwrap()
            })
            .collect();
        Tensor::cat(&outputs, 1).unwrap()
    }

    #[test]
    fn attention_is_the_composition_of_candles_ops_for_each_sequence() {
        for (query, kv) in [(2, 2), (4, 2), (3, 1)] {
            let heads = Heads { query, kv, size: 4 };
            let inputs = [check::normal(5, &[8, heads.width()])];
            let lengths = [3, 0, 1, 4];
            let op = |t: &[Tensor]| attention(&t[0], heads, Arc::from(ROPE), &lengths).unwrap();
            let composed = |t: &[Tensor]| {
                let sequence =
                    |at, len| composed_sequence(&t[0].narrow(0, at, len).unwrap(), heads);
                Tensor::cat(&[sequence(0, 3), sequence(3, 1), sequence(4, 4)], 0).unwrap()
            };
            check::same_as(op, composed, &inputs, 2e-6);
            check::finite_differences(op, &inputs, 5e-3);
        }
    }

    #[test]
    fn attention_when_a_sequence_is_beyond_the_table_is_an_error() {
        let heads = Heads {
            query: 1,
            kv: 1,
            size: 4,
        };
        let qkv = check::normal(1, &[6, 12]);
        let error = attention(&qkv, heads, Arc::from(ROPE), &[6]).unwrap_err();
        assert!(error.to_string().contains("at most 5 tokens"), "{error}");
    }
}
