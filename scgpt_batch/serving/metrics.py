"""The endpoint's metrics, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SIZES = [10.0**e for e in range(2, 9)]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one endpoint, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        r = self.registry
        self.requests = Counter("scgpt_batch_requests", "Completed requests by HTTP status", ["status"], registry=r)
        self.seconds = Histogram(
            "scgpt_batch_request_seconds",
            "Seconds from complete request to complete response",
            buckets=SECONDS,
            registry=r,
        )
        self.request_bytes = Histogram(
            "scgpt_batch_request_bytes", "Size of request bodies, as received", buckets=SIZES, registry=r
        )
        self.answer_bytes = Histogram("scgpt_batch_answer_bytes", "Size of response bodies", buckets=SIZES, registry=r)
        self.in_flight = Gauge("scgpt_batch_requests_in_flight", "Requests in progress", registry=r)
        self.batch_requests = Histogram(
            "scgpt_batch_device_batch_requests",
            "Requests computed in one batch",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=r,
        )
        self.unauthorized = Counter("scgpt_batch_unauthorized_requests", "Requests without a valid token", registry=r)
        self.refused_connections = Counter(
            "scgpt_batch_refused_connections",
            "Connections closed by a limit, by limit",
            ["limit"],
            registry=r,
        )
        self.spooled = Counter("scgpt_batch_log_spooled", "Records written to the spool", registry=r)
        self.logged = Counter("scgpt_batch_log_written", "Records written to the inference table", registry=r)
        self.log_failures = Counter(
            "scgpt_batch_log_failures",
            "Failed writes, to the spool (the record is lost) or to the table (retried)",
            ["to"],
            registry=r,
        )
        self.log_moved_aside = Counter(
            "scgpt_batch_log_moved_aside",
            "Spool files with invalid records, moved aside",
            registry=r,
        )
        self.spool_bytes = Gauge("scgpt_batch_log_spool_bytes", "Bytes not yet in the inference table", registry=r)
        self.gpu_unusable = Gauge(
            "scgpt_batch_gpu_unusable", "1 if the machine has a GPU that torch cannot use, else 0", registry=r
        )
        for to in ("spool", "table"):
            self.log_failures.labels(to)  # so that they are exported as 0 from the start

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def totals(self) -> dict[str, int]:
        """Return the totals for the command's summary."""

        def total(counter: Counter) -> int:
            return int(
                sum(s.value for family in counter.collect() for s in family.samples if s.name.endswith("_total"))
            )

        return {"requests": total(self.requests), "logged": total(self.logged)}
