// A reader of JSON, as much of it as manifests and safetensors headers have: RFC 8259, without \u beyond Latin-1.
#pragma once

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum class Kind { null, boolean, number, text, list, object };
  Kind kind = Kind::null;
  double number = 0;
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  const Json& at(const std::string& key) const {
    auto found = object.find(key);
    if (found == object.end()) throw std::runtime_error("JSON: no \"" + key + "\"");
    return found->second;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& source) : at_(source.c_str()), end_(at_ + source.size()) {}

  Json read() {
    Json value = next();
    skip();
    if (at_ != end_) fail("more follows");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* what) { throw std::runtime_error(std::string("JSON: ") + what); }

  void skip() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }

  bool take(char wanted) {
    skip();
    if (at_ == end_ || *at_ != wanted) return false;
    ++at_;
    return true;
  }

  void need(char wanted) {
    if (!take(wanted)) fail("a sign is missing");
  }

  bool word(const char* wanted) {
    const std::string text(wanted);
    const auto left = static_cast<std::size_t>(end_ - at_);
    if (left < text.size() || text.compare(0, text.size(), at_, text.size()) != 0) return false;
    at_ += text.size();
    return true;
  }

  Json next() {
    Json value;
    skip();
    if (at_ == end_) fail("it ends too early");
    if (take('{')) {
      value.kind = Json::Kind::object;
      if (take('}')) return value;
      do {
        skip();
        std::string key = string();
        need(':');
        value.object[key] = next();
      } while (take(','));
      need('}');
    } else if (take('[')) {
      value.kind = Json::Kind::list;
      if (take(']')) return value;
      do {
        value.list.push_back(next());
      } while (take(','));
      need(']');
    } else if (*at_ == '"') {
      value.kind = Json::Kind::text;
      value.text = string();
    } else if (word("true") || word("false")) {
      value.kind = Json::Kind::boolean;  // which of them, nothing here asks
    } else if (!word("null")) {
      char* stop = nullptr;
      value.kind = Json::Kind::number;
      value.number = std::strtod(at_, &stop);
      if (stop == at_) fail("a value is missing");
      at_ = stop;
    }
    return value;
  }

  std::string string() {
    need('"');
    std::string text;
    while (at_ != end_ && *at_ != '"') {
      char sign = *at_++;
      if (sign == '\\') {
        if (at_ == end_) break;
        sign = *at_++;
        static const std::string kNames = "nrtbf", kSigns = "\n\r\t\b\f";
        if (sign == 'u') {
          if (end_ - at_ < 4) break;
          const long code = std::strtol(std::string(at_, 4).c_str(), nullptr, 16);
          at_ += 4;
          if (code < 0x80) {
            text += static_cast<char>(code);
          } else if (code < 0x100) {
            text += static_cast<char>(0xC0 | (code >> 6));
            text += static_cast<char>(0x80 | (code & 0x3F));
          } else {
            text += '?';  // only texts for people have these, which are printed and not compared
          }
          continue;
        }
        if (auto place = kNames.find(sign); place != std::string::npos) sign = kSigns[place];
      }
      text += sign;
    }
    need('"');
    return text;
  }

  const char* at_;
  const char* end_;
};
