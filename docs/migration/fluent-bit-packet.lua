-- Makes a fastdist packet of a record: its JSON under "body", and the headers to post it with under "headers".
local emitter = os.getenv("HOSTNAME") or "fluent-bit"
local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }

local function quote(text)
    return '"' .. text:gsub('[%c"\\]', function(character)
        return escapes[character] or string.format("\\u%04x", character:byte())
    end) .. '"'
end

function packet(tag, timestamp, record)
    local message = '{"message":' .. quote(tostring(record["log"] or ""))
    message = message .. ',"timestamp":"' .. os.date("!%Y-%m-%dT%H:%M:%SZ", math.floor(timestamp)) .. '"'
    if record["file"] then
        message = message .. ',"source":' .. quote(tostring(record["file"]))
    end
    local body = '{"emitterId":' .. quote(emitter) .. ',"messages":[' .. message .. "}]}"
    return 2, timestamp, { body = body, headers = { ["Content-Type"] = "application/json" } }
end
