//! How metrics are made, registered and listed.

use prometheus::core::Collector;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::kinds::{By, Counter, Gauge, Histogram, RealGauge};
use super::labels::Label;

/// What a metric is, for documentation and for checks of dashboards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only goes up.
    Counter,
    /// A level.
    Gauge,
    /// `_bucket`, `_sum` and `_count`.
    Histogram,
}

impl MetricKind {
    /// The word in the exposition format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One line of the list of metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricInfo {
    /// Name, without a histogram's suffixes.
    pub name: String,
    /// One sentence.
    pub help: String,
    /// Type.
    pub kind: MetricKind,
    /// Names of the labels.
    pub labels: Vec<&'static str>,
}

/// Makes metrics and lists them.
#[derive(Default)]
pub(super) struct Builder {
    pub(super) registry: Registry,
    pub(super) infos: Vec<MetricInfo>,
}

impl Builder {
    fn register<T: Collector + Clone + 'static>(
        &mut self,
        made: prometheus::Result<T>,
        kind: MetricKind,
        labels: &[&'static str],
    ) -> T {
        let registered = made.and_then(|metric| {
            self.registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        });
        match registered {
            Ok(metric) => {
                self.infos
                    .extend(metric.desc().iter().map(|desc| MetricInfo {
                        name: desc.fq_name.clone(),
                        help: desc.help.clone(),
                        kind,
                        labels: labels.to_vec(),
                    }));
                metric
            }
            Err(error) => panic!("a metric is malformed: {error}"),
        }
    }

    pub(super) fn counter_vec(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&'static str],
    ) -> impl Fn(&[&str]) -> Counter + use<> {
        let made = IntCounterVec::new(Opts::new(name, help), labels);
        let vec = self.register(made, MetricKind::Counter, labels);
        move |values| Counter(vec.with_label_values(values))
    }

    pub(super) fn gauge_vec(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&'static str],
    ) -> IntGaugeVec {
        let made = IntGaugeVec::new(Opts::new(name, help), labels);
        self.register(made, MetricKind::Gauge, labels)
    }

    pub(super) fn histogram_vec(
        &mut self,
        name: &str,
        help: &str,
        buckets: &[f64],
        labels: &[&'static str],
    ) -> impl Fn(&[&str]) -> Histogram + use<> {
        let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let made = HistogramVec::new(opts, labels);
        let vec = self.register(made, MetricKind::Histogram, labels);
        move |values| Histogram(vec.with_label_values(values))
    }

    pub(super) fn counter(&mut self, name: &str, help: &str) -> Counter {
        self.counter_vec(name, help, &[])(&[])
    }

    pub(super) fn counters_by<A: Label>(&mut self, name: &str, help: &str) -> By<A, Counter> {
        let child = self.counter_vec(name, help, &[A::NAME]);
        By::new(|a: A| child(&[a.as_str()]))
    }

    pub(super) fn counters_by_two<A: Label, B: Label>(
        &mut self,
        name: &str,
        help: &str,
    ) -> By<A, By<B, Counter>> {
        let child = self.counter_vec(name, help, &[A::NAME, B::NAME]);
        By::new(|a: A| By::new(|b: B| child(&[a.as_str(), b.as_str()])))
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str) -> Gauge {
        let none: &[&str] = &[];
        Gauge(self.gauge_vec(name, help, &[]).with_label_values(none))
    }

    pub(super) fn gauges_by<A: Label>(&mut self, name: &str, help: &str) -> By<A, Gauge> {
        let vec = self.gauge_vec(name, help, &[A::NAME]);
        By::new(|a: A| Gauge(vec.with_label_values(&[a.as_str()])))
    }

    pub(super) fn real_gauge(&mut self, name: &str, help: &str) -> RealGauge {
        let made = prometheus::Gauge::new(name, help);
        RealGauge(self.register(made, MetricKind::Gauge, &[]))
    }

    pub(super) fn histogram(&mut self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.histogram_vec(name, help, buckets, &[])(&[])
    }

    pub(super) fn histograms_by<A: Label>(
        &mut self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> By<A, Histogram> {
        let child = self.histogram_vec(name, help, buckets, &[A::NAME]);
        By::new(|a: A| child(&[a.as_str()]))
    }

    pub(super) fn histograms_by_two<A: Label, B: Label>(
        &mut self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> By<A, By<B, Histogram>> {
        let child = self.histogram_vec(name, help, buckets, &[A::NAME, B::NAME]);
        By::new(|a: A| By::new(|b: B| child(&[a.as_str(), b.as_str()])))
    }
}
