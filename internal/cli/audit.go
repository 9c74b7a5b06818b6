package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

func (a *app) auditCommand() *cobra.Command {
	return a.noun("audit", "The audit log: what was issued, and what admins did", "", a.auditSearchCommand(), a.auditTailCommand())
}

func (a *app) auditSearchCommand() *cobra.Command {
	var since, until string
	var events []string
	var limit int32
	cmd := &cobra.Command{
		Use:   "search [TEXT]",
		Short: "Search the audit log of this replica, oldest record first",
		Long: `Search the audit log of this replica of the CA. TEXT is a whole value, such as a SPIFFE ID, an entry ID or a serial number: records
whose actor, subject or any detail equals it are shown. With -o json each record is one line, as in the log.`,
		Example: `  signet audit search spiffe://example.org/web --since 24h
  signet audit search --event entry.create --event entry.delete --since 2026-11-01T00:00:00Z -o json`,
		Args: atMostArgs(1),
	}
	output := outputFlag(cmd)
	cmd.Flags().StringVar(&since, "since", "", "from this moment on: RFC 3339, or how long ago, such as 24h")
	cmd.Flags().StringVar(&until, "until", "", "up to this moment: RFC 3339, or how long ago")
	cmd.Flags().StringArrayVar(&events, "event", nil, "only these events, such as x509svid.issued (repeatable)")
	cmd.Flags().Int32Var(&limit, "limit", 1000, "at most this many records")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if limit < 1 {
			return usagef("--limit %d is not a positive number", limit)
		}
		req := &adminv1.SearchAuditRequest{Events: events, Limit: limit}
		var err error
		if req.Since, err = a.moment("--since", since); err != nil {
			return err
		}
		if req.Until, err = a.moment("--until", until); err != nil {
			return err
		}
		if len(args) == 1 {
			req.Text = args[0]
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			n, err := a.printAudit(ctx, c, *output, req)
			if err != nil {
				return err
			}
			if n == 0 {
				a.note("no record matches")
			} else if n == int(limit) {
				a.note("there may be more than these %s: --limit", count(n, "record"))
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}

func (a *app) auditTailCommand() *cobra.Command {
	var events []string
	var lines int32
	cmd := &cobra.Command{
		Use:   "tail [TEXT]",
		Short: "Follow the audit log of this replica",
		Long:  `Print the newest records of the audit log and go on with new ones until stopped. TEXT is as for 'signet audit search'.`,
		Example: `  signet audit tail
  signet audit tail --event x509svid.issued -o json`,
		Args: atMostArgs(1),
	}
	output := outputFlag(cmd)
	cmd.Flags().StringArrayVar(&events, "event", nil, "only these events, such as x509svid.issued (repeatable)")
	cmd.Flags().Int32VarP(&lines, "lines", "n", 10, "how many past records to begin with")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if lines < 1 {
			return usagef("--lines %d is not a positive number", lines)
		}
		req := &adminv1.SearchAuditRequest{Events: events, Limit: lines, Follow: true}
		if len(args) == 1 {
			req.Text = args[0]
		}
		return a.withCAUnbounded(cmd.Context(), func(ctx context.Context, c *caConn) error {
			_, err := a.printAudit(ctx, c, *output, req)
			return untilCanceled(ctx, err)
		})
	}
	return a.reachesCA(cmd)
}

// moment reads RFC 3339 or how long ago.
func (a *app) moment(flag, s string) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return timestamppb.New(t), nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return nil, usagef("%s %q is neither a moment such as 2026-11-01T00:00:00Z nor a length of time such as 24h", flag, s)
	}
	return timestamppb.New(a.now().Add(-d)), nil
}

func (a *app) printAudit(ctx context.Context, c *caConn, f format, req *adminv1.SearchAuditRequest) (int, error) {
	stream, err := adminv1.NewAdminClient(c).SearchAudit(ctx, req)
	if err != nil {
		return 0, caError("reading the audit log", c, err)
	}
	for n := 0; ; n++ {
		record, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, caError("reading the audit log", c, err)
		}
		if err := a.printRecord(f, record.GetJson()); err != nil {
			return n, err
		}
	}
}

// printRecord prints one record: as it is in the log with -o json, as a document with -o yaml, else as a line with time
// and event in front.
func (a *app) printRecord(f format, text []byte) error {
	switch f {
	case formatJSON:
		_, err := fmt.Fprintln(a.stdout, escapeEncoded(string(bytes.TrimSpace(text)), false))
		return err
	case formatYAML:
		doc, err := encodeYAML(json.RawMessage(text))
		if err != nil {
			return err
		}
		_, err = io.WriteString(a.stdout, "---\n"+doc)
		return err
	}
	pairs, err := flatten(text)
	if err != nil {
		return fmt.Errorf("reading a record of the audit log: %w", err)
	}
	var line []string
	for _, p := range pairs {
		switch p[0] {
		case "time", "event":
			line = append(line, escape(p[1]))
		default:
			if f == formatWide || !auditNoise[p[0]] {
				line = append(line, paint(a.color, cyan, escape(strings.TrimPrefix(p[0], "details."))+"=")+escape(quoteSpaces(p[1])))
			}
		}
	}
	_, err = fmt.Fprintln(a.stdout, strings.Join(line, "  "))
	return err
}

// auditNoise are the members that a table leaves to -o wide.
var auditNoise = map[string]bool{"v": true, "seq": true, "actor_kind": true, "details.address": true}

// flatten lists the members of a JSON object in their order, those of inner objects as outer.inner.
func flatten(text []byte) ([][2]string, error) {
	var out [][2]string
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("it is not a JSON object")
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil, err
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, err
		}
		key := fmt.Sprint(name)
		var s string
		switch {
		case bytes.HasPrefix(value, []byte("{")):
			inner, err := flatten(value)
			if err != nil {
				return nil, err
			}
			for _, p := range inner {
				out = append(out, [2]string{key + "." + p[0], p[1]})
			}
		case json.Unmarshal(value, &s) == nil:
			out = append(out, [2]string{key, s})
		default:
			out = append(out, [2]string{key, string(value)})
		}
	}
	return out, nil
}

func quoteSpaces(s string) string {
	if s == "" || strings.ContainsAny(s, " \"=") {
		return fmt.Sprintf("%q", s)
	}
	return s
}
