package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/strictyaml"
)

// maxDocumentFiles bounds how many files -f may stand for.
const maxDocumentFiles = 10_000

// filesFlag adds -f.
func filesFlag(cmd *cobra.Command, use string) *[]string {
	files := new([]string)
	cmd.Flags().StringArrayVarP(files, "file", "f", nil, use)
	return files
}

// documentsFrom reads the documents in files: a file, a directory (its *.yaml, *.yml and *.json, not those below), or -
// for stdin.
func (a *app) documentsFrom(cmd *cobra.Command, files []string) ([]strictyaml.Document, error) {
	if len(files) == 0 {
		return nil, &usageError{err: fmt.Errorf("-f is missing: a file, a directory, or - for stdin"), hint: example(cmd)}
	}
	names, err := documentFiles(files)
	if err != nil {
		return nil, err
	}
	var docs []strictyaml.Document
	var mistakes []error
	size := 0
	for _, name := range names {
		data, err := a.readInput(name, maxDocuments)
		if err != nil {
			return nil, err
		}
		if size += len(data); size > maxDocuments {
			return nil, fmt.Errorf("the files of -f have more than %d bytes in all: apply them in several calls", maxDocuments)
		}
		found, err := strictyaml.Split(data, inputName(name), 1)
		if err != nil {
			mistakes = append(mistakes, err)
			continue
		}
		for _, d := range found {
			if err := registry.CheckForm(d); err != nil {
				mistakes = append(mistakes, err)
			}
		}
		docs = append(docs, found...)
	}
	if len(mistakes) > 0 {
		return nil, errors.Join(mistakes...)
	}
	if len(docs) == 0 {
		return nil, fmt.Errorf("there is no document in %q", files)
	}
	return docs, nil
}

// documentFiles puts the files of a directory in its place.
func documentFiles(files []string) ([]string, error) {
	var names []string
	for _, name := range files {
		info, err := os.Stat(name)
		if name == "-" || err == nil && !info.IsDir() {
			names = append(names, name)
			continue
		}
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("-f %q: there is no such file", name)
			}
			return nil, fmt.Errorf("-f %q: %w", name, err)
		}
		items, err := os.ReadDir(name)
		if err != nil {
			return nil, fmt.Errorf("-f %q: %w", name, err)
		}
		found := 0
		for _, item := range items {
			if slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(item.Name())) && !item.IsDir() {
				names = append(names, filepath.Join(name, item.Name()))
				found++
			}
		}
		if found == 0 {
			return nil, fmt.Errorf("-f %q: the directory has no *.yaml, *.yml or *.json file", name)
		}
	}
	if len(names) > maxDocumentFiles {
		return nil, fmt.Errorf("-f stands for %d files, at most %d are read in one call", len(names), maxDocumentFiles)
	}
	return names, nil
}

func wireDocuments(docs []strictyaml.Document) []*adminv1.Document {
	out := make([]*adminv1.Document, len(docs))
	for i, d := range docs {
		out[i] = &adminv1.Document{Content: d.Content, File: d.File, Line: uint32(d.Line)}
	}
	return out
}
