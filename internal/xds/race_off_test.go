//go:build !race

package xds

const fanOut = 1000 // streams
