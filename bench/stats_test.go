package main

import (
	"math"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		samples []float64
		want    float64
	}{
		{[]float64{7}, 7},
		{[]float64{3, 1, 2}, 2},
		{[]float64{4, 1, 3, 2}, 2.5},
	} {
		if got := median(c.samples); got != c.want {
			t.Errorf("median(%v) = %v, want %v", c.samples, got, c.want)
		}
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("median of nothing = %v", got)
	}
}

func TestMedianLeavesSamples(t *testing.T) {
	samples := []float64{3, 1, 2}
	median(samples)
	percentile(50)(samples)
	if samples[0] != 3 || samples[1] != 1 || samples[2] != 2 {
		t.Errorf("samples were sorted: %v", samples)
	}
}

func TestRoundedMedian(t *testing.T) {
	if got := roundedMedian([]float64{1.004, 1.0049, 1.0001}); got != 1 {
		t.Errorf("got %v, want 1", got)
	}
	if got := roundedMedian([]float64{1.006}); got != 1.01 {
		t.Errorf("got %v, want 1.01", got)
	}
}

func TestPercentileIsNearestRank(t *testing.T) {
	// The example that textbooks use.
	samples := []float64{35, 20, 15, 50, 40}
	for _, c := range []struct{ p, want float64 }{
		{0, 15}, {5, 15}, {30, 20}, {40, 20}, {50, 35}, {99, 50}, {100, 50},
	} {
		if got := percentile(c.p)(samples); got != c.want {
			t.Errorf("p%v = %v, want %v", c.p, got, c.want)
		}
	}
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	if got := percentile(99)(hundred); got != 99 {
		t.Errorf("p99 of 1 to 100 = %v, want 99", got)
	}
	if got := percentile(99)(nil); !math.IsNaN(got) {
		t.Errorf("p99 of nothing = %v", got)
	}
}
