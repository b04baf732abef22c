package etcd

import (
	"slices"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/zap/zapcore"
)

// logCore carries etcd's log into ours: warnings and errors only, and nothing
// once the store is being closed, when etcd complains about its own end.
type logCore struct {
	log    hclog.Logger
	fields []zapcore.Field
	closed *atomic.Bool // shared by all cores made by With
}

func newLogCore(log hclog.Logger) *logCore {
	return &logCore{log: log.Named("etcd"), closed: new(atomic.Bool)}
}

// quiet ends all output.
func (c *logCore) quiet() { c.closed.Store(true) }

// Enabled implements [zapcore.LevelEnabler].
func (c *logCore) Enabled(l zapcore.Level) bool {
	return l >= zapcore.WarnLevel && !c.closed.Load()
}

// With implements [zapcore.Core].
func (c *logCore) With(fields []zapcore.Field) zapcore.Core {
	return &logCore{log: c.log, fields: slices.Concat(c.fields, fields), closed: c.closed}
}

// expected tells complaints about what is as it should be: there is no HTTP
// server, and the database of a young server holds no term until its first
// snapshot, so that its schema version is written some seconds later.
func expected(msg string) bool {
	switch msg {
	case "Running http and grpc server on single port. This is not recommended for production.",
		"Failed to detect schema version",
		"failed to update storage version":
		return true
	}
	return false
}

// Check implements [zapcore.Core].
func (c *logCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(e.Level) || expected(e.Message) {
		return ce
	}
	return ce.AddCore(e, c)
}

// Write implements [zapcore.Core].
func (c *logCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range slices.Concat(c.fields, fields) {
		f.AddTo(enc)
	}
	var args []any
	for _, k := range sortedKeys(enc.Fields) {
		args = append(args, k, enc.Fields[k])
	}
	if e.Level >= zapcore.ErrorLevel {
		c.log.Error(e.Message, args...)
	} else {
		c.log.Warn(e.Message, args...)
	}
	return nil
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// Sync implements [zapcore.Core].
func (*logCore) Sync() error { return nil }
