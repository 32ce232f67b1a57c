package main

import (
	"math"
	"slices"
)

// Statistics of samples. Each leaves the slice as it is, and returns NaN if
// there are none.

// median returns the middle sample, or the mean of the two in the middle.
func median(samples []float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(samples))
	half := len(s) / 2
	if len(s)%2 == 1 {
		return s[half]
	}
	return (s[half-1] + s[half]) / 2
}

// roundedMedian is the median with two decimals. It is for counts per element,
// where what the runtime allocates for itself meanwhile is less than that.
func roundedMedian(samples []float64) float64 { return math.Round(median(samples)*100) / 100 }

// percentile returns a function that returns the smallest sample that p
// percent of the samples do not exceed (the nearest rank).
func percentile(p float64) func([]float64) float64 {
	return func(samples []float64) float64 {
		if len(samples) == 0 {
			return math.NaN()
		}
		s := slices.Sorted(slices.Values(samples))
		rank := int(math.Ceil(p / 100 * float64(len(s))))
		return s[min(max(rank, 1), len(s))-1]
	}
}
